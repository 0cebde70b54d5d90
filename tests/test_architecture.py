"""The rules of the architecture, read from the source.

Packages import in one direction and never each other, heavy or external libraries stay in the
packages that wrap them, what a newcomer starts with loads no torch, and no file, function or
argument list grows long.
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
    {"paths", "comparison"},
    {"runtime"},
    {"models"},
    {"data", "reporting"},
    {"planning", "evaluation"},
    {"training", "orchestration", "tracking"},
    {"workflow"},
    {"cli"},
)
"""The packages of `pipelines`, from the bottom to the top: each imports only from levels below its
own."""
WITHOUT_TORCH = ("config.recipe", "runtime.launcher", "workflow.stages", "orchestration.deploy")
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
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {
        name for name in (path.partition("/")[0] for path in tracked) if not name.startswith(".")
    } == TOP_LEVEL


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
    environment = os.environ | {
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
def test_the_library_imports_nothing_above_it(path: Path) -> None:
    assert not imported_libraries(path) & FORBIDDEN_IN_LIBRARY


@pytest.mark.parametrize("library", ["peft", "trl"])
def test_reference_implementations_are_not_imported(library: str) -> None:
    assert files_importing(library) == set()


@pytest.mark.parametrize("library", WRAPPED)
def test_external_servers_are_called_from_their_packages_only(library: str) -> None:
    assert {package_of(module_name(FILES[name])) for name in files_importing(library)} == WRAPPED[
        library
    ]


def package_of(module: str) -> str:
    """Return the package, or the module, directly below the root of a module."""
    return [*module.split("."), "__init__"][1]


def edges_between(packages: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """Return which package imports which, from what each module of one root imports."""
    pairs = {(module, target) for module, targets in packages.items() for target in targets}
    edges = {(package_of(a), package_of(b)) for a, b in pairs if a.split(".")[0] == b.split(".")[0]}
    return {(a, b) for a, b in edges if a != b and "__init__" not in (a, b)}


def upward(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the imports that do not point to a lower level."""
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    return {(a, b) for a, b in edges if level[a] <= level[b]}


def mutual(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the pairs of packages that import each other."""
    return {(a, b) for a, b in edges if a < b and (b, a) in edges}


def imports_of(root: str) -> dict[str, set[str]]:
    """Return what each module of a root imports of the same root."""
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


def test_a_violation_is_found() -> None:
    """The rules above are applied to imports that break them."""
    broken = {
        "pipelines.config.recipe": {"pipelines.workflow.flows"},
        "pipelines.workflow.flows": {"pipelines.config.recipe"},
    }
    edges = edges_between(broken)
    assert upward(edges) == {("config", "workflow")}
    assert mutual(edges) == {("config", "workflow")}
    assert upward(edges_between({"pipelines.data.batches": {"pipelines.reporting.report"}})) == {
        ("data", "reporting")
    }


def test_no_import_cycle() -> None:
    modules = {module_name(path) for path in FILES.values()}
    graph = {
        module_name(path): (imported_names(path) & modules) - {module_name(path)}
        for path in FILES.values()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_loading_imports_no_torch(module: str, tmp_path: Path) -> None:
    output = run_python(
        "-c", f"import sys, pipelines.{module}; print('torch' in sys.modules)", home=tmp_path
    ).stdout
    assert output.strip() == "False"


def test_help_imports_no_torch(tmp_path: Path) -> None:
    result = run_python("-X", "importtime", "-m", "pipelines.cli", "--help", home=tmp_path)
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in result.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "Usage" in result.stdout
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "prefect", "mlflow"}


@each_file
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@each_file
def test_no_function_is_long(path: Path) -> None:
    lengths = {
        function.name: (function.end_lineno or 0) - function.lineno + 1
        for function in functions_in(path)
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


@each_file
def test_no_argument_list_is_wide(path: Path) -> None:
    widths: dict[str, int] = {}
    for function in functions_in(path):
        given = function.args
        extra = [argument for argument in (given.vararg, given.kwarg) if argument is not None]
        named = [
            argument
            for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs]
            if argument.arg not in ("self", "cls")
        ]
        widths[function.name] = len(named) + len(extra)
    assert {name: width for name, width in widths.items() if width > MAX_ARGUMENTS} == {}


SCRIPTS = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("benchmarks", "distributed", "faults", "parity", "truth")
    for path in sorted((ROOT / "tests" / folder).glob("*.py"))
}


@pytest.mark.parametrize("path", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_what_no_test_runs_imports_names_that_exist(path: Path) -> None:
    """Benchmarks and the long experiments are run seldom, and are not to find out then that a name
    has gone.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        module = (
            FILES.get(f"{str(node.module).replace('.', '/')}.py")
            if isinstance(node, ast.ImportFrom)
            else None
        )
        if module is not None:
            missing = {alias.name for alias in node.names} - names_of(module)
            assert not missing, (
                f"line {node.lineno}: {node.module} has no {', '.join(sorted(missing))}"
            )


def names_of(path: Path) -> set[str]:
    """Return what a module binds at its top level."""
    bound: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Function | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        else:
            bound |= {
                name.id
                for name in ast.walk(node)
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
    return bound
