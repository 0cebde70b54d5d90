"""Checkpoints of a training run: whole or absent, verified when read, and the same under every engine and number of ranks.

    <stage>/checkpoints/step-00010/
        weights.safetensors       what is trained, and the starts that layers take off again
        exp_avg.safetensors       Adam's means, by parameter name
        exp_avg_sq.safetensors
        random.safetensors        each rank's random state
        state.json                steps, the loss of the last ones, the ranks; a digest of each file

A checkpoint stands between two optimiser steps, so no part of an accumulation window is ever in it, and the order of the
data follows from the number of steps. The frozen base is loaded again from where it lies. A run that was stopped on two
ranks goes on with one, or four: ranks that were there before draw what they would have drawn, others start anew.

The newest few are kept, and the best. Where memory allows, one is written by a thread beside the training, from a copy;
elsewhere file by file while training waits. One that is due but would take more than its share of the time waits for the
next turn: a run that has gone on for a minute has less to lose than a large checkpoint costs. Nothing in them is a pickle.
"""

import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from errno import EIO, ENOSPC
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.adapter.adapter_files import read_json
from lora_core.files import folder_written_aside, sha256_of_file, write_json
from pipelines.runtime.heartbeats import note
from pipelines.runtime.memory import free_memory_bytes
from pipelines.training.adam_state import KEYS, restore, whole_moments, whole_weights
from pipelines.training.engine import Engine

STATE, WEIGHTS, RANDOM = "state.json", "weights", "random"
ROOM = 2
"""How many times a checkpoint must fit into the memory that is left, for it to be copied and written beside the training."""
BYTES_PER_SECOND = 400e6
"""What writing is taken to cost before a first one was written."""
STATE_BYTES = 12
"""Of a trained weight: itself and both means in float32."""
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was read and is whole."""

    step: int
    ranks: int
    """Ranks that wrote it."""
    tensors: dict[str, Tensors]
    """File → its tensors."""


@dataclass
class Checkpoints:
    """The checkpoints of one run, inside a block at whose end all are written; rank 0 writes them."""

    folder: Path
    """checkpoints/ of the stage."""
    kept: int
    """How many of the newest stay, beside the best."""
    share: float = 1.0
    """Of the time so far, what writing them may take."""
    trained_weights: int = 0
    """Of which a checkpoint's size is known before there is one."""
    _writer: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"), repr=False
    )
    _pending: "Future[None] | None" = field(default=None, repr=False)
    _begun: float = field(default_factory=time.monotonic, repr=False)
    _written: int = 0
    _waited: float = 0.0
    """Seconds that the training stood still for them."""
    _beside: float = 0.0
    """Seconds that a core was taken beside it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for what is being written: a run whose steps are done needs it no more, and what ended another says more."""
        try:
            self.wait()
        except OSError as failure:
            note(self.folder.parent, f"the last checkpoint was not written ({failure})")

    @property
    def figures(self) -> dict[str, float]:
        """Return how many were written since this process began, and what that took."""
        return {
            "written": self._written,
            "seconds": round(self._waited, 3),
            "seconds_beside": round(self._beside, 3),
        }

    def due(self) -> bool:
        """Tell whether one more keeps them within their share of the time; every rank asks, and is told the same.

        Raises:
            OSError: the one before could not be written.
        """
        at_work = self._pending is not None and not self._pending.done()
        if not at_work:
            self.wait()
        spent = self._waited + self._beside
        each = spent / self._written if self._written else self._bytes / BYTES_PER_SECOND
        choice = [
            self.share == 1
            or (not at_work and spent + each <= self.share * (time.monotonic() - self._begun))
        ]
        broadcast_object_list(choice)
        return bool(choice[0])

    def save(self, engine: Engine, step: int, loss: float) -> None:
        """Keep the state after `step` steps; every rank calls it, and returns when the state is copied or written.

        Args:
            engine: what is trained.
            step: optimiser steps taken.
            loss: mean of the last steps, by which the best checkpoint is known.

        Raises:
            OSError: this one, or the one before it, could not be written.
        """
        random = gather_object([random_state()])
        begun = time.monotonic()
        files = _whole_state(engine, random)
        if not engine.is_first:
            for _ in files if engine.zero_stage else ():  # each is gathered from all ranks
                pass
            return
        self.wait()
        values = {"step": step, "loss": loss, "ranks": engine.ranks}
        if free_memory_bytes() > ROOM * self._bytes:
            self._pending = self._writer.submit(self._write_beside, step, list(files), values)
        else:
            self._write(step, files, values)
        self._written += 1
        self._waited += time.monotonic() - begun

    def wait(self) -> None:
        """Return when what was to be written is written; raise what the writing raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def discard(self) -> None:
        """Remove all: the run has ended and its outcome is saved."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _bytes(self) -> int:
        return STATE_BYTES * self.trained_weights

    def _write_beside(
        self, step: int, files: list[tuple[str, Tensors]], values: dict[str, Any]
    ) -> None:
        begun = time.thread_time()
        self._write(step, files, values)
        self._beside += time.thread_time() - begun

    def _write(
        self, step: int, files: Iterable[tuple[str, Tensors]], values: dict[str, Any]
    ) -> None:
        with folder_written_aside(self.folder / _name(step)) as aside:
            for name, tensors in files:
                _save(tensors, aside / f"{name}.safetensors")
            digests = {path.name: sha256_of_file(path) for path in sorted(aside.iterdir())}
            write_json(aside / STATE, {**values, "files": digests})
        self._let_old_ones_go()

    def _let_old_ones_go(self) -> None:
        every = _folders(self.folder)
        best = min(every, key=_loss_of)
        for folder in every[: -self.kept]:
            if folder != best:
                shutil.rmtree(folder)


def select_checkpoint(engine_is_first: bool, place: Path) -> LoadedCheckpoint | None:
    """Return the checkpoint that all ranks go on from: the one that rank 0 found whole, read by each."""
    found = latest_valid(place) if engine_is_first else None
    choice = [found.step if found is not None else 0]
    broadcast_object_list(choice)
    return found if engine_is_first or choice[0] == 0 else _read(place / _name(choice[0]))


def latest_valid(place: Path) -> LoadedCheckpoint | None:
    """Return the newest whole checkpoint, and note of each that is not why it is passed over; None where there is none."""
    for folder in reversed(_folders(place)):
        problem = damage(folder)
        if problem is None:
            return _read(folder)
        note(place.parent, f"{folder} is damaged ({problem}); going on from the one before it")
    return None


def resume(engine: Engine, found: LoadedCheckpoint | None, seed: int) -> int:
    """Go on from a checkpoint, whose weights the model holds already; return the steps that it holds, 0 where there is none."""
    if found is None:
        return 0
    restore(engine, found.tensors[WEIGHTS], {key: found.tensors[key] for key in KEYS}, found.step)
    rank = engine.accelerator.process_index
    if rank < found.ranks:
        set_random_state(
            {
                name.partition(".")[2]: state
                for name, state in found.tensors[RANDOM].items()
                if name.startswith(f"{rank}.")
            }
        )
    else:
        torch.manual_seed(seed + rank + 1000 * found.step)
    return found.step


@torch.no_grad()
def load_trained_weights(model: nn.Module, weights: Tensors) -> None:
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


def _whole_state(engine: Engine, random: list[Tensors]) -> Iterator[tuple[str, Tensors]]:
    """Yield file after file its tensors, whole on rank 0 and none elsewhere; all ranks gather one parameter after the other."""
    weights = _on_first(engine, whole_weights(engine))
    yield WEIGHTS, weights | starts(engine.model) if engine.is_first else weights
    for key in KEYS:
        yield key, _on_first(engine, whole_moments(engine, key))
    yield (
        RANDOM,
        {
            f"{rank}.{name}": state
            for rank, states in enumerate(random)
            for name, state in states.items()
        },
    )


def _on_first(engine: Engine, tensors: Iterator[tuple[str, Tensor]]) -> Tensors:
    return {name: tensor for name, tensor in tensors if engine.is_first}


def starts(model: nn.Module) -> Tensors:
    """Return the buffers that say what a layer takes off again: another machine may find other signs for them."""
    return {
        name: buffer.detach().to("cpu", copy=True)
        for name, buffer in model.named_buffers()
        if name.endswith((".init_A", ".start_B"))
    }


def _read(folder: Path) -> LoadedCheckpoint:
    state = read_json(folder / STATE)
    return LoadedCheckpoint(
        state["step"],
        state["ranks"],
        {name.removesuffix(".safetensors"): load_file(folder / name) for name in state["files"]},
    )


def _save(tensors: Tensors, path: Path) -> None:
    """Write a file of tensors; what the system refuses is an OSError, which safetensors hides in an error of its own."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = ENOSPC if f"os error {ENOSPC}" in str(error) else EIO
        raise OSError(number, str(error), str(path)) from error


def _name(step: int) -> str:
    return f"step-{step:05d}"


def _folders(place: Path) -> list[Path]:
    return sorted(place.glob("step-*"))


def _loss_of(folder: Path) -> float:
    """Return the loss by which a checkpoint is best; one whose state cannot be read is the worst, and ends no run."""
    try:
        return float(read_json(folder / STATE)["loss"])
    except (OSError, ValueError, KeyError):
        return inf
