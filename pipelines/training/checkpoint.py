"""Checkpoints on disk: complete or absent, verified when read, the same under every engine.

    <stage>/checkpoints/step-00010/
        weights.safetensors       trained weights, and the initial A and B that are subtracted
        exp_avg.safetensors       Adam's means, by parameter name
        exp_avg_sq.safetensors
        random.safetensors        each rank's random state
        state.json                steps, mean loss of the last steps, ranks; digest of each file
    <stage>/checkpoints/best/     the weights with the lowest held-out loss; see `best_weights`

A checkpoint is written between two optimizer steps, so it never contains a part of a gradient
accumulation window, and the order of the data follows from the number of steps. The frozen base is
loaded again from its own folder. Nothing in a checkpoint is a pickle.
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from errno import EIO, ENOSPC
from math import inf
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_core.adapter.json_files import read_json
from lora_core.files import atomic_folder, sha256_of_file, write_json
from pipelines.runtime.heartbeats import note

STATE, WEIGHTS, RANDOM = "state.json", "weights", "random"
PREFIX, SUFFIX = "step-", ".safetensors"
CHECKPOINT = re.compile(rf"{PREFIX}\d+\Z")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was read and is valid."""

    step: int
    ranks: int
    """Ranks that wrote it."""
    tensors: dict[str, Tensors]
    """File → its tensors."""


def select_checkpoint(is_first: bool, parent: Path) -> LoadedCheckpoint | None:
    """Return the checkpoint from which all ranks resume; None if there is none.

    A collective: rank 0 selects it, and every rank reads it.

    Args:
        is_first: this rank selects.
        parent: folder of the checkpoints, which all ranks can read.
    """
    checkpoint = latest_valid(parent) if is_first else None
    choice = [0 if checkpoint is None else checkpoint.step]
    broadcast_object_list(choice)
    step = choice[0]
    if is_first or step == 0:
        return checkpoint
    return read_checkpoint(parent / folder_name(step))


def latest_valid(parent: Path) -> LoadedCheckpoint | None:
    """Return the newest valid checkpoint or None, and note why newer ones are skipped."""
    for folder in reversed(checkpoint_folders(parent)):
        reason = corruption_reason(folder)
        if reason is None:
            return read_checkpoint(folder)
        note(parent.parent, f"{folder} is damaged ({reason}); resuming from the one before it")
    return None


def corruption_reason(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is valid."""
    try:
        state = read_json(folder / STATE)
        for name, sha256 in state["files"].items():
            if sha256_of_file(folder / name) != sha256:
                return f"{name} does not match its digest"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_checkpoint(folder: Path) -> LoadedCheckpoint:
    """Read a checkpoint without verifying it."""
    state = read_json(folder / STATE)
    tensors = {name.removesuffix(SUFFIX): load_file(folder / name) for name in state["files"]}
    return LoadedCheckpoint(state["step"], state["ranks"], tensors)


def write_checkpoint(
    folder: Path, files: Iterable[tuple[str, Tensors]], values: dict[str, Any]
) -> None:
    """Write a checkpoint under a temporary name, then rename it.

    Args:
        folder: of the checkpoint; complete or absent, whatever happens.
        files: name and tensors of each file; written one after the other, so that they need not all
            be in memory.
        values: steps, loss and number of ranks.

    Raises:
        OSError: the file system refuses to write.
    """
    with atomic_folder(folder) as temporary:
        for name, tensors in files:
            _save(tensors, temporary / f"{name}{SUFFIX}")
        digests = {path.name: sha256_of_file(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / STATE, {**values, "files": digests})


def remove_old(parent: Path, keep: int) -> None:
    """Remove all checkpoints except the newest `keep` and the one with the lowest loss.

    Args:
        parent: folder of the checkpoints, of which there is at least one.
        keep: number of the newest to keep, at least 1.
    """
    folders = checkpoint_folders(parent)
    best = min(folders, key=_loss_of)
    for folder in folders[:-keep]:
        if folder != best:
            shutil.rmtree(folder)


def checkpoint_folders(parent: Path) -> list[Path]:
    """Return the folders of all checkpoints, the oldest first: by number, not as text."""
    folders = [folder for folder in parent.glob(f"{PREFIX}*") if CHECKPOINT.match(folder.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(folder.name.removeprefix(PREFIX))


def checkpoint_steps(parent: Path) -> list[int]:
    """Return the steps of all checkpoints, the oldest first."""
    return [step_of(folder) for folder in checkpoint_folders(parent)]


def folder_name(step: int) -> str:
    """Return the name of the folder of a checkpoint."""
    return f"{PREFIX}{step:05d}"


def _save(tensors: Tensors, path: Path) -> None:
    """Write a file of tensors; raise OSError, which safetensors wraps in its own error type."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = ENOSPC if f"os error {ENOSPC}" in str(error) else EIO
        raise OSError(number, str(error), str(path)) from error


def _loss_of(folder: Path) -> float:
    """Return a checkpoint's loss; infinity if its state cannot be read, which ends no run."""
    try:
        return float(read_json(folder / STATE)["loss"])
    except (OSError, ValueError, KeyError):
        return inf
