"""Checkpoints of a training run: whole or absent, verified when read, and the same under every engine and number of ranks.

    <stage>/checkpoints/step-00010/
        weights.safetensors       what is trained, and the starts that layers take off again
        exp_avg.safetensors       Adam's means, by parameter name
        exp_avg_sq.safetensors
        random.safetensors        each rank's random state
        state.json                steps, the loss since the checkpoint before, the ranks; a digest of each file

A checkpoint stands between two optimiser steps, so no part of an accumulation window is ever in it, and the order of the
data follows from the number of steps. The frozen base is loaded again from where it lies. A run that was stopped on two
ranks goes on with one, or four: ranks that were there before draw what they would have drawn, others start anew.

The newest few are kept, and the best. Small ones are written by a thread beside the training, from a copy; one whose copy
would cost memory is written while training waits. Nothing in them is a pickle.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.adapter.files import read_json
from lora_core.files import folder_written_aside, sha256_of_file, write_json
from pipelines.heartbeats import note
from pipelines.training.engine import Engine
from pipelines.training.moments import KEYS, restore, whole_moments, whole_weights

STATE, WEIGHTS, RANDOM = "state.json", "weights", "random"
COPIED_BYTES = 512 << 20
"""Largest state that is copied to be written beside the training."""
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read and is whole."""

    step: int
    ranks: int
    """Ranks that wrote it."""
    tensors: dict[str, Tensors]
    """File → its tensors."""


@dataclass
class Checkpoints:
    """The checkpoints of one run; rank 0 writes them."""

    folder: Path
    """checkpoints/ of the stage."""
    kept: int
    """How many of the newest stay, beside the best."""
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"), repr=False)
    _pending: "Future[None] | None" = field(default=None, repr=False)

    def save(self, engine: Engine, step: int, loss: float) -> None:
        """Keep the state after `step` steps; every rank calls it, and returns when the state is copied or written.

        Args:
            engine: what is trained.
            step: optimiser steps taken.
            loss: mean since the checkpoint before, by which the best one is known.

        Raises:
            OSError: this one, or the one before it, could not be written.
        """
        random = gather_object([random_state()])
        tensors = _whole_state(engine)
        if not engine.is_first:
            return
        tensors[RANDOM] = {f"{rank}.{name}": state for rank, states in enumerate(random) for name, state in states.items()}
        values = {"step": step, "loss": loss, "ranks": engine.ranks}
        self.wait()
        self._pending = self._writer.submit(self._write, step, tensors, values)
        if sum(tensor.nbytes for some in tensors.values() for tensor in some.values()) > COPIED_BYTES:
            self.wait()

    def wait(self) -> None:
        """Return when what was to be written is written; raise what the writing raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Found | None:
        """Return the newest whole checkpoint, and note of each that is not why it is passed over; None where there is none."""
        for folder in reversed(_folders(self.folder)):
            problem = damage(folder)
            if problem is None:
                state = read_json(folder / STATE)
                tensors = {name.removesuffix(".safetensors"): load_file(folder / name) for name in state["files"]}
                return Found(state["step"], state["ranks"], tensors)
            note(self.folder.parent, f"{folder} is damaged ({problem}); going on from the one before it")
        return None

    def discard(self) -> None:
        """Remove all: the run has ended and its outcome is saved."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, step: int, tensors: dict[str, Tensors], values: dict[str, Any]) -> None:
        with folder_written_aside(self.folder / f"step-{step:05d}") as aside:
            for name, some in tensors.items():
                save_file(some, aside / f"{name}.safetensors", metadata={"format": "pt"})
            digests = {path.name: sha256_of_file(path) for path in sorted(aside.iterdir())}
            write_json(aside / STATE, {**values, "files": digests})
        self._let_old_ones_go()

    def _let_old_ones_go(self) -> None:
        every = _folders(self.folder)
        best = min(every, key=_loss_of)
        for folder in every[: -self.kept]:
            if folder != best:
                shutil.rmtree(folder)


def agreed(engine_is_first: bool, checkpoints: Checkpoints) -> Found | None:
    """Return the checkpoint that all ranks go on from: the one that rank 0 found whole, read by each."""
    found = checkpoints.newest() if engine_is_first else None
    choice = [found.step if found is not None else 0]
    broadcast_object_list(choice)
    if engine_is_first or choice[0] == 0:
        return found
    own = checkpoints.folder / f"step-{choice[0]:05d}"
    state = read_json(own / STATE)
    return Found(state["step"], state["ranks"], {name.removesuffix(".safetensors"): load_file(own / name) for name in state["files"]})


def resume(engine: Engine, found: Found | None, seed: int) -> int:
    """Go on from a checkpoint, whose weights the model holds already; return the steps that it holds, 0 where there is none."""
    if found is None:
        return 0
    restore(engine, found.tensors[WEIGHTS], {key: found.tensors[key] for key in KEYS}, found.step)
    rank = engine.accelerator.process_index
    if rank < found.ranks:
        set_random_state({name.partition(".")[2]: state for name, state in found.tensors[RANDOM].items() if name.startswith(f"{rank}.")})
    else:
        torch.manual_seed(seed + rank + 1000 * found.step)
    return found.step


@torch.no_grad()
def take_up(model: nn.Module, weights: Tensors) -> None:
    """Copy what was trained, and the starts, into a model that no engine has wrapped yet."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None where it is whole."""
    try:
        state = read_json(folder / STATE)
        for name, sha256 in state["files"].items():
            if sha256_of_file(folder / name) != sha256:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def random_state() -> Tensors:
    """Return this rank's random state."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def set_random_state(state: Tensors) -> None:
    """Draw on from where a rank was."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _whole_state(engine: Engine) -> dict[str, Tensors]:
    """Return every tensor by file, whole on rank 0 and nothing elsewhere; all ranks gather one parameter after the other."""
    parts: dict[str, Iterator[tuple[str, Tensor]]] = {WEIGHTS: whole_weights(engine), **{key: whole_moments(engine, key) for key in KEYS}}
    whole: dict[str, Tensors] = {file: {} for file in parts}
    for file, part in parts.items():
        for name, tensor in part:
            if engine.is_first:
                whole[file][name] = tensor
    if engine.is_first:
        whole[WEIGHTS] |= starts(engine.model)
    return whole


def starts(model: nn.Module) -> Tensors:
    """Return the buffers that say what a layer takes off again: another machine may find other signs for them."""
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers() if name.endswith((".start_A", ".start_B"))}


def _folders(place: Path) -> list[Path]:
    return sorted(place.glob("step-*"))


def _loss_of(folder: Path) -> float:
    """Return the loss by which a checkpoint is best; one whose state cannot be read is the worst, and ends no run."""
    try:
        return float(read_json(folder / STATE)["loss"])
    except (OSError, ValueError, KeyError):
        return inf
