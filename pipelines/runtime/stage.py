"""A stage of a run: its inputs, the folder that they name, and its result.

    <runs>/<kind>/<label>-<key>/
        inputs.json    everything that determines the outcome, and where to find it
        result.json    written last: the results, and a digest of each file that later stages read

The key is a digest of the inputs: equal work is cached, whichever recipe needs it, and a changed
setting repeats only what depends on it. To run a stage by hand:

    python -m <module of its kind, see interfaces/kinds.py> <folder of the stage>
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic

from pydantic import ValidationError

from lora_core.files import sha256_of_file, write_json
from pipelines.errors import ERROR_FILE, StageError, one_line
from pipelines.runtime.interfaces.inputs import StagePaths, TrainOptions
from pipelines.runtime.interfaces.kinds import Inputs, Result, StageKind
from pipelines.runtime.interfaces.results import StageResult

INPUTS, RESULT, LOG, SNAPSHOTS = "inputs.json", "result.json", "log.txt", "snapshots"
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class Stage(Generic[Inputs, Result]):
    """One unit of work, identified by its inputs."""

    kind: StageKind[Inputs, Result]
    label: str
    """Name for readers, such as rank-4."""
    inputs: Inputs
    """What determines the outcome; it makes the key."""
    root: Path
    """Folder of all runs."""
    paths: StagePaths = field(default_factory=StagePaths)
    """Where to find what the inputs name by digest; not part of the key."""
    options: TrainOptions | None = None
    """Of a training: settings that do not change the outcome; not part of the key."""
    expects: tuple[str, ...] = ()
    """Files that the options require: a result without them is incomplete."""

    @property
    def key(self) -> str:
        """SHA-256 of the kind, the inputs and the library versions."""
        return digest(
            {
                "kind": self.kind.name,
                "format": self.kind.format,
                "inputs": self.inputs.plain(),
                "versions": library_versions(),
            }
        )

    @property
    def folder(self) -> Path:
        """The folder with the key in its name.

        The label in the name is that of the first run to begin the stage.
        """
        parent = self.root / self.kind.name
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
                "kind": self.kind.name,
                "label": self.label,
                "key": self.key,
                "inputs": self.inputs.plain(),
                "paths": self.paths.plain(),
                "options": None if self.options is None else self.options.model_dump(mode="json"),
                "versions": library_versions(),
            },
        )
        return self.folder

    def result(self) -> Result | None:
        """Return the result if the stage is done and all its files are complete, else None."""
        return read_result(self.folder, self.kind, self.expects)


def read_inputs(folder: Path, kind: StageKind[Inputs, Result]) -> tuple[Inputs, StagePaths]:
    """Return a stage's inputs and paths.

    Args:
        folder: of the stage.
        kind: with the type of its inputs.

    Raises:
        StageError: they are not those of this kind of stage.
    """
    try:
        values = json.loads((folder / INPUTS).read_text())
        inputs = kind.inputs.model_validate(values["inputs"])
        return inputs, StagePaths(**values["paths"])
    except (ValidationError, KeyError, TypeError) as error:
        raise StageError(
            f"{folder / INPUTS} does not contain the inputs of a stage {kind} "
            f"({one_line(error, limit=160)}); run the recipe, which writes it again"
        ) from error


def read_options(folder: Path) -> TrainOptions:
    """Return the options of a training."""
    values = json.loads((folder / INPUTS).read_text())
    return TrainOptions.model_validate(values["options"])


def read_result(
    folder: Path, kind: StageKind[Inputs, Result], expects: Iterable[str] = ()
) -> Result | None:
    """Return what a stage reported; None if it is unfinished or a file is not intact.

    Args:
        folder: of the stage.
        kind: with the type of its result.
        expects: files without which the result is incomplete.
    """
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
    try:
        return kind.result.model_validate(values["result"])
    except (ValidationError, KeyError):
        return None  # written by another version of this software


def write_result(folder: Path, result: StageResult, files: list[str]) -> None:
    """Mark a stage as done.

    Args:
        folder: the stage's folder.
        result: what the stage reports.
        files: paths inside the folder that later stages read; their digests are stored.
    """
    digests = {name: sha256_of_file(folder / name) for name in sorted(files)}
    write_json(folder / RESULT, {"result": result.plain(), "files": digests})


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
