"""The rules of the architecture, read from the source.

Packages import in one direction and never each other, heavy or external libraries stay in the
packages that wrap them, the entry points load no torch, and no file, function or argument list is
too long.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lora_core", "pipelines")
FILES = {
    path.relative_to(ROOT).as_posix(): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
FORBIDDEN_IN_LIBRARY = {"pipelines", "prefect", "mlflow", "accelerate", "datasets", "transformers"}
WRAPPED = {"prefect": {"orchestration", "workflow"}, "mlflow": {"tracking"}}
"""External library → the packages that may import it."""
LEVELS = (
    {"errors", "console"},
    {"config"},
    {"paths"},
    {"runtime"},
    {"models", "comparison"},
    {"data", "reporting"},
    {"planning", "evaluation"},
    {"training", "orchestration", "tracking"},
    {"workflow"},
    {"cli"},
)
"""The packages of `pipelines`, from the bottom to the top: each imports only from levels below its
own."""
WITHOUT_TORCH = (
    "config.recipe",
    "orchestration.deploy",
    "reporting.report",
    "runtime.launcher",
    "tracking.preflight",
    "workflow.flows",
    "workflow.print_registry",
    "workflow.publishing",
)
"""Loaded by the main process of a run, or by a command that only asks a server."""
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 400, 80, 6
FOLDERS = {"pipelines", "lora_core", "infra", "tests"}
TOP_LEVEL = FOLDERS | {
    "pyproject.toml",
    "README.md",
    "Makefile",
    "constraints.txt",
    "CHANGELOG.md",
    "LICENSE",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef

each_file = pytest.mark.parametrize("path", FILES.values(), ids=FILES.keys())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_nothing_else_is_at_the_top_level() -> None:
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {path.partition("/")[0] for path in listing.stdout.split()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_names(path: Path) -> set[str]:
    """Return what a file imports anywhere, in functions too; `from a import b` counts as a and as
    a.b.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path} line {node.lineno} imports relatively; name the package"
            )
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported_libraries(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_names(path)}


def files_importing(library: str) -> set[str]:
    return {name for name, path in FILES.items() if library in imported_libraries(path)}


def functions_in(path: Path) -> list[Function]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, Function)
    ]


def run_python(*arguments: str, home: Path) -> "subprocess.CompletedProcess[str]":
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result


@pytest.mark.parametrize(
    "path",
    [path for name, path in FILES.items() if name.startswith("lora_core/")],
    ids=lambda path: path.name,
)
def test_the_library_does_not_import_the_pipeline(path: Path) -> None:
    assert not imported_libraries(path) & FORBIDDEN_IN_LIBRARY


@pytest.mark.parametrize("library", ["peft", "trl"])
def test_reference_implementations_are_not_imported(library: str) -> None:
    assert files_importing(library) == set()


@pytest.mark.parametrize("library", WRAPPED)
def test_external_servers_are_called_from_their_packages_only(library: str) -> None:
    packages = {package_of(module_name(FILES[name])) for name in files_importing(library)}
    assert packages == WRAPPED[library]


def package_of(module: str) -> str:
    """Return the package, or the module, directly below the root of a module."""
    return [*module.split("."), "__init__"][1]


def edges_between(packages: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """Return which package imports which, given the imports of each module of one root."""
    edges = set()
    for module, targets in packages.items():
        for target in targets:
            edge = (package_of(module), package_of(target))
            is_same_root = module.split(".")[0] == target.split(".")[0]
            if is_same_root and edge[0] != edge[1] and "__init__" not in edge:
                edges.add(edge)
    return edges


def upward(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the imports that do not point to a lower level."""
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    return {(a, b) for a, b in edges if level[a] <= level[b]}


def mutual(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the pairs of packages that import each other."""
    return {(a, b) for a, b in edges if a < b and (b, a) in edges}


def imports_of(root: str) -> dict[str, set[str]]:
    """Return the imports of each module of a root from the same root."""
    modules = {
        module_name(path): path for name, path in FILES.items() if name.startswith(f"{root}/")
    }
    return {
        module: (imported_names(path) & modules.keys()) - {module}
        for module, path in modules.items()
    }


def test_packages_import_downward_only() -> None:
    edges = edges_between(imports_of("pipelines"))
    assert {name for edge in edges for name in edge} == set().union(*LEVELS)
    assert upward(edges) == set()


@pytest.mark.parametrize("root", PACKAGES)
def test_no_two_packages_import_each_other(root: str) -> None:
    assert mutual(edges_between(imports_of(root))) == set()


def test_violations_are_found() -> None:
    """The rules report imports that violate them."""
    broken = {
        "pipelines.config.recipe": {"pipelines.workflow.flows"},
        "pipelines.workflow.flows": {"pipelines.config.recipe"},
    }
    edges = edges_between(broken)
    assert upward(edges) == {("config", "workflow")}
    assert mutual(edges) == {("config", "workflow")}
    same_level = {"pipelines.data.batches": {"pipelines.reporting.report"}}
    assert upward(edges_between(same_level)) == {("data", "reporting")}


def test_no_import_cycle() -> None:
    modules = {module_name(path) for path in FILES.values()}
    graph = {}
    for path in FILES.values():
        name = module_name(path)
        graph[name] = (imported_names(path) & modules) - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_loading_imports_no_torch(module: str, tmp_path: Path) -> None:
    code = f"import sys, pipelines.{module}; print('torch' in sys.modules)"
    assert run_python("-c", code, home=tmp_path).stdout.strip() == "False"


def test_help_imports_no_heavy_library(tmp_path: Path) -> None:
    result = run_python("-X", "importtime", "-m", "pipelines.cli", "--help", home=tmp_path)
    imported = set()
    for line in result.stderr.splitlines():
        if line.startswith("import time:"):
            module = line.rpartition("|")[2].strip()
            imported.add(module.partition(".")[0])
    assert "Usage" in result.stdout
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "prefect", "mlflow", "scipy", "datasets"}


@each_file
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@each_file
def test_no_function_is_long(path: Path) -> None:
    too_long = {}
    for function in functions_in(path):
        length = (function.end_lineno or 0) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            too_long[function.name] = length
    assert too_long == {}


@each_file
def test_no_argument_list_is_long(path: Path) -> None:
    too_long = {}
    for function in functions_in(path):
        number = len(arguments_of(function))
        if number > MAX_ARGUMENTS:
            too_long[function.name] = number
    assert too_long == {}


def arguments_of(function: Function) -> list[str]:
    """Return the names of a function's arguments, without self and cls."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    names = [argument.arg for argument in arguments if argument is not None]
    return [name for name in names if name not in ("self", "cls")]


SCRIPTS = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("benchmarks", "distributed", "faults", "parity", "truth")
    for path in sorted((ROOT / "tests" / folder).glob("*.py"))
}


@pytest.mark.parametrize("path", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_scripts_import_names_that_exist(path: Path) -> None:
    """Benchmarks and long experiments are run seldom, so a renamed import would go unnoticed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = FILES.get(f"{str(node.module).replace('.', '/')}.py")
        if module is not None:
            missing = {alias.name for alias in node.names} - names_of(module)
            names = ", ".join(sorted(missing))
            assert not missing, f"line {node.lineno}: {node.module} has no {names}"


def names_of(path: Path) -> set[str]:
    """Return the names that a module binds at its top level."""
    bound: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Function | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        else:
            names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
            bound |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return bound
