"""A stage of a run: its inputs, the folder that they name, and its result.

    <runs>/<kind>/<label>-<key>/
        inputs.json    everything that determines the outcome, and where to find it
        result.json    written last: the results, and a digest of each file that later stages read

The key is a digest of the inputs: equal work is cached, whichever recipe needs it, and a changed
setting repeats only what depends on it. To run a stage by hand:

    python -m <module of its kind, see MODULES> <folder of the stage>
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_core.files import sha256_of_file, write_json
from pipelines.errors import ERROR_FILE

INPUTS, RESULT, LOG, SNAPSHOTS = "inputs.json", "result.json", "log.txt", "snapshots"
FORMATS = {"base": 4, "data": 5, "plan": 7, "train": 6, "tune": 5, "cut": 3, "evaluate": 6}
"""Kind of a stage → a number to increase when its outcome changes for the same inputs."""
MODULES = {
    "base": "pipelines.models.base_model",
    "data": "pipelines.data.preparation",
    "plan": "pipelines.planning.plan",
    "train": "pipelines.training.train",
    "tune": "pipelines.evaluation.tuning",
    "cut": "pipelines.models.truncate",
    "evaluate": "pipelines.evaluation.evaluate",
}
"""Kind of a stage → the module that runs it in a child process. The parent does not import it,
because most of these modules import torch."""
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "datasets")
StageResult = dict[str, Any]
"""What a stage reports: plain values by name."""


@dataclass(frozen=True)
class Stage:
    """One unit of work, identified by its inputs."""

    kind: str
    """A key of MODULES."""
    label: str
    """Name for readers, such as rank-4."""
    inputs: Mapping[str, Any]
    """Plain values that determine the outcome; they make the key."""
    root: Path
    """Folder of all runs."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Where to find what the inputs name by digest; not part of the key."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further settings that do not change the outcome; not part of the key."""
    expects: tuple[str, ...] = ()
    """Files that the options require: a result without them is incomplete."""

    @property
    def key(self) -> str:
        """SHA-256 of the kind, the inputs and the library versions."""
        return digest(
            {
                "kind": self.kind,
                "format": FORMATS.get(self.kind, 1),
                "inputs": self.inputs,
                "versions": library_versions(),
            }
        )

    @property
    def folder(self) -> Path:
        """The folder with the key in its name.

        The label in the name is that of the first run to begin the stage.
        """
        parent = self.root / self.kind
        key = self.key[:12]
        existing = sorted(parent.glob(f"*-{key}"))
        return existing[0] if existing else parent / f"{self.label}-{key}"

    def begin(self) -> Path:
        """Create the folder with inputs.json, delete an earlier error, and return the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ERROR_FILE).unlink(missing_ok=True)
        write_json(
            self.folder / INPUTS,
            {
                "kind": self.kind,
                "label": self.label,
                "key": self.key,
                "inputs": dict(self.inputs),
                "paths": dict(self.paths),
                "options": dict(self.options),
                "versions": library_versions(),
            },
        )
        return self.folder

    def result(self) -> StageResult | None:
        """Return the result if the stage is done and all its files are complete, else None."""
        return read_result(self.folder, self.expects)


def read_inputs(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a stage's inputs and paths."""
    values = json.loads((folder / INPUTS).read_text())
    return values["inputs"], values["paths"]


def read_options(folder: Path) -> dict[str, Any]:
    """Return a stage's options."""
    options: dict[str, Any] = json.loads((folder / INPUTS).read_text())["options"]
    return options


def read_result(folder: Path, expects: Iterable[str] = ()) -> StageResult | None:
    """Return what a stage reported; None if it is unfinished or a file is not intact."""
    path = folder / RESULT
    if not path.is_file():
        return None
    values: dict[str, Any] = json.loads(path.read_text())
    digests: dict[str, str] = values["files"]
    if not set(expects) <= digests.keys():
        return None
    for name, sha256 in digests.items():
        file = folder / name
        if not file.is_file() or sha256_of_file(file) != sha256:
            return None
    result: StageResult = values["figures"]
    return result


def write_result(folder: Path, figures: Mapping[str, Any], files: list[str]) -> None:
    """Mark a stage as done.

    Args:
        folder: the stage's folder.
        figures: plain values that the stage reports.
        files: paths inside the folder that later stages read; their digests are stored.
    """
    digests = {name: sha256_of_file(folder / name) for name in sorted(files)}
    write_json(folder / RESULT, {"figures": dict(figures), "files": digests})


def snapshot(step: int) -> str:
    """Return the subfolder of a training stage with the weights after `step` steps."""
    return f"{SNAPSHOTS}/step-{step:05d}"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def digest(value: Any) -> str:
    """Return the SHA-256 of a plain value in canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def library_versions() -> dict[str, str]:
    """Return the versions that can change an outcome, read without importing the libraries."""
    return {name: version(name) for name in LIBRARIES}
