"""infra/README.md and the files next to it are correct: commands, variables, launches, links."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipelines.cli import app
from pipelines.config.sections import LaunchSection
from pipelines.runtime.child import PARENT, WORKER_INDEX
from pipelines.runtime.launcher import CONFIGS, config_file

REPOSITORY = Path(__file__).parents[2]
INFRA = REPOSITORY / "infra"
PAGE = (INFRA / "README.md").read_text()
OTHER_FOLDERS = (CONFIGS, INFRA / "deepspeed", INFRA / "images")
"""Folders whose files the page does not list one by one."""
FILES = [
    path for path in sorted(INFRA.rglob("*")) if path.is_file() and path.parent not in OTHER_FOLDERS
]
COMPOSE = (INFRA / "compose.yaml").read_text()


def in_source(name: str, *folders: Path, kinds: tuple[str, ...] = ("*.py",)) -> bool:
    """Return whether a file of these kinds in the folders contains the name."""
    included = [f"--include={kind}" for kind in kinds]
    return (
        subprocess.run(
            ["grep", "-rqwF", *included, name, *map(str, folders)], check=False
        ).returncode
        == 0
    )


def library(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def of_prefect(name: str) -> bool:
    import prefect.settings

    return hasattr(prefect.settings, name)


READERS: dict[str, Callable[[str], bool]] = {
    "the pipeline": lambda name: in_source(
        f'"{name}"', REPOSITORY / "pipelines", REPOSITORY / "lora_core"
    ),
    "compose.yaml": lambda name: f"${{{name}" in COMPOSE,
    "servers": lambda name: in_source(name, INFRA / "servers", kinds=("*",)),
    "Prefect": of_prefect,
    "MLflow": lambda name: in_source(name, library("mlflow")),
    "Hugging Face": lambda name: in_source(name, library("huggingface_hub")),
    "PyTorch": lambda name: in_source(name, library("torch"), kinds=("*.py", "libtorch_cpu.so")),
    # CPU builds do not contain NCCL, but its users name its variables
    "NCCL": lambda name: in_source(name, library("torch"), library("deepspeed")),
}


def variables() -> Iterator[tuple[str, list[str]]]:
    """Yield each variable of the page's table, with the programs listed as its readers."""
    for names, readers in re.findall(
        r"^\| ((?:`[A-Z0-9_]+`(?:, )?)+) \| ([^|]+) \|", PAGE, flags=re.MULTILINE
    ):
        for name in re.findall(r"`([A-Z0-9_]+)`", names):
            yield name, readers.strip().split(", ")


VARIABLES = dict(variables())


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return each `lora` command of a text, such as `registry list`, with its options."""
    found = re.findall(r"(?<![\w./-])lora ((?:registry |adapter )?[a-z][\w-]*)([^\n`;'|]*)", text)
    return [(command, re.findall(r"(?<!\S)--[a-z-]+", rest)) for command, rest in found]


def all_commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each command under its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from all_commands(command, f"{name} ")
        else:
            yield prefix + name, command


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_every_command_and_option_exists(path: Path) -> None:
    known = dict(all_commands(typer.main.get_command(app)))
    for command, options in commands(path.read_text()):
        assert command in known, f"lora {command}"
        assert set(options) <= {
            name for parameter in known[command].params for name in parameter.opts
        }, f"lora {command}"


def test_commands_are_found_in_the_files() -> None:
    assert ("run", ["--rank"]) in commands(PAGE)
    assert ("join", ["--machine"]) in commands((INFRA / "slurm" / "finetune.sbatch").read_text())
    assert ("join", ["--machine"]) in commands((INFRA / "kubernetes" / "job.yaml").read_text())
    assert ("deploy", ["--cron"]) in commands(COMPOSE)


@pytest.mark.parametrize(("name", "readers"), VARIABLES.items(), ids=VARIABLES)
def test_every_variable_is_read_by_the_named_programs(name: str, readers: list[str]) -> None:
    for reader in readers:
        assert READERS[reader](name), f"{reader} does not read {name}"


def test_every_variable_is_on_the_page() -> None:
    own: set[str] = set()
    for folder in ("pipelines", "lora_core"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            own |= set(re.findall(r'"(LORA_[A-Z_]+)"', path.read_text()))
    settings = {
        line.partition("=")[0]
        for line in (INFRA / "kubernetes" / "settings.env").read_text().splitlines()
        if line[0] != "#"
    }
    services = yaml.safe_load(COMPOSE)["services"].values()
    composed = {name for service in services for name in service["environment"]} | set(
        re.findall(r"\$\{(\w+)", COMPOSE)
    )
    image = {"POSTGRES_USER", "POSTGRES_DB"}
    """Variables of the database image, fixed in compose.yaml."""
    assert own - {PARENT, WORKER_INDEX} | settings | composed - image <= set(VARIABLES)


def test_every_launch_exists_and_is_documented() -> None:
    named = {
        name
        for path in FILES
        for name in re.findall(r"\b(?:cpu|gpu)_[a-z0-9_]*[a-z0-9]", path.read_text())
    }
    assert named == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_launch_config_has_its_deepspeed_settings(name: str) -> None:
    section = yaml.safe_load(config_file(name).read_text()).get("deepspeed_config", {})
    if section:
        stage = json.loads((REPOSITORY / section["deepspeed_config_file"]).read_text())[
            "zero_optimization"
        ]["stage"]
        assert f"zero{stage}" in name


def test_every_launch_section_on_the_page_is_valid() -> None:
    sections = re.findall(r"^launch: (\{.*?\})", PAGE, flags=re.MULTILINE)
    assert sections
    for section in sections:
        LaunchSection.model_validate(yaml.safe_load(section))


def headings() -> set[str]:
    """Return the anchors of the page's headings, and the empty one of the page itself."""
    titles = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    return {"", *(title.lower().replace(" ", "-") for title in titles)}


def test_every_link_has_a_target() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        assert (INFRA / file).exists(), link
        assert heading in headings(), link


def test_every_file_is_on_the_page() -> None:
    for path in FILES:
        name = path.relative_to(INFRA)
        if name.name in ("README.md", ".gitignore", "Dockerfile.dockerignore"):
            continue
        assert any(str(part) in PAGE for part in (name, name.parent) if str(part) != "."), name


def test_slurm_script_passes_shellcheck() -> None:
    script = str(INFRA / "slurm" / "finetune.sbatch")
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_slurm_gives_the_run_time_to_stop() -> None:
    from pipelines.runtime.launcher import GRACE_SECONDS

    script = (INFRA / "slurm" / "finetune.sbatch").read_text()
    [(signal, seconds)] = re.findall(
        r"^#SBATCH --signal=B:(\w+)@(\d+)$", script, flags=re.MULTILINE
    )
    assert f"trap 'requeue=yes; end_both' {signal}" in script
    assert int(seconds) - 60 > GRACE_SECONDS, "SLURM may send it up to a minute late"
