"""A stage of a run: what goes in, the folder that those inputs name, and the result that says it is done.

    <runs>/<kind>/<label>-<key>/
        inputs.json    everything that decides the outcome, and where to find it
        result.json    written last: the figures, and a digest of each file that later stages read

The key is a digest of the inputs, so equal work is found again whoever asks for it, and a changed setting repeats only
what depends on it. A stage is run by hand with the command that `inputs.json` holds.
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
"""Kind of a stage → a number to raise when its outcome changes for the same inputs."""
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class Stage:
    """One unit of work, identified by its inputs."""

    kind: str
    """base, data, plan, train or evaluate."""
    label: str
    """What a reader calls it, such as rank-4."""
    inputs: Mapping[str, Any]
    """Plain values that decide the outcome; they make the key."""
    root: Path
    """Folder of all runs."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Where to find what the inputs name by digest; not part of the key."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What is asked for besides and leaves the outcome as it is; not part of the key."""
    expects: tuple[str, ...] = ()
    """Files that the options ask for: a result without them is not the whole one."""

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
        """The folder that bears the key; the label is a name for whoever looks, and the first to begin the stage gives it."""
        kind, key = self.root / self.kind, self.key[:12]
        return next(iter(sorted(kind.glob(f"*-{key}"))), kind / f"{self.label}-{key}")

    def begin(self) -> Path:
        """Create the folder with inputs.json, clear a former error, and return the folder."""
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

    def result(self) -> dict[str, Any] | None:
        """Return the result when the stage is done and every file it names or that is expected is whole; None otherwise."""
        return read_result(self.folder, self.expects)


def read_inputs(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a stage's inputs and paths."""
    values = json.loads((folder / INPUTS).read_text())
    return values["inputs"], values["paths"]


def read_options(folder: Path) -> dict[str, Any]:
    """Return what a stage is asked for besides."""
    options: dict[str, Any] = json.loads((folder / INPUTS).read_text())["options"]
    return options


def read_result(folder: Path, expects: Iterable[str] = ()) -> dict[str, Any] | None:
    """Return a stage's figures, or None where it is unfinished, or a file of it was changed, lost or never made."""
    path = folder / RESULT
    if not path.is_file():
        return None
    values: dict[str, Any] = json.loads(path.read_text())
    if not set(expects) <= values["files"].keys():
        return None
    whole = all(
        (folder / name).is_file() and sha256_of_file(folder / name) == sha256
        for name, sha256 in values["files"].items()
    )
    return values["figures"] if whole else None


def write_result(folder: Path, figures: Mapping[str, Any], files: list[str]) -> None:
    """Declare a stage done.

    Args:
        folder: the stage's folder.
        figures: plain values.
        files: paths inside the folder that later stages read; their digests are kept.
    """
    digests = {name: sha256_of_file(folder / name) for name in sorted(files)}
    write_json(folder / RESULT, {"figures": dict(figures), "files": digests})


def snapshot(step: int) -> str:
    """Return where in a training stage's folder stands what was trained after `step` steps."""
    return f"{SNAPSHOTS}/step-{step:05d}"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def digest(value: Any) -> str:
    """Return the SHA-256 of a plain value in canonical JSON."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


@cache
def library_versions() -> dict[str, str]:
    """Return the versions that can change an outcome, read without importing the libraries."""
    return {name: version(name) for name in LIBRARIES}
