"""Decide when to write a checkpoint, write it, and remove old ones.

The newest few are kept, and the best. If memory allows, a background thread writes a copy;
otherwise training waits while file after file is written. If a checkpoint that is due would exceed
its fraction of the training time, it is skipped until the next turn: shortly after the start, a
run has less to lose than a large checkpoint costs.
"""

import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate.utils import broadcast_object_list

from pipelines.runtime.heartbeats import note
from pipelines.runtime.interfaces.results import CheckpointMetrics
from pipelines.runtime.memory import free_memory_bytes
from pipelines.training.checkpoint import (
    Tensors,
    checkpoint_steps,
    folder_name,
    remove_old,
    write_checkpoint,
)
from pipelines.training.checkpoint_state import full_state, random_state
from pipelines.training.engine import Engine

HEADROOM = 2
"""How many times a checkpoint must fit into free memory to be copied and written in background."""
BYTES_PER_SECOND = 400e6
"""Assumed writing speed before the first checkpoint."""
STATE_BYTES = 12
"""Per trained weight: itself and both means in float32."""


def _single_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "checkpoint")


@dataclass
class Checkpoints:
    """The checkpoints of one run; when the context exits, all are written. Rank 0 writes."""

    folder: Path
    """checkpoints/ of the stage."""
    keep: int
    """How many of the newest to keep, in addition to the best."""
    time_fraction: float = 1.0
    """Fraction of the elapsed time that writing may take."""
    trained_weights: int = 0
    """Gives the size of a checkpoint before there is one."""
    _writer: ThreadPoolExecutor = field(default_factory=_single_thread, repr=False)
    _pending: "Future[None] | None" = field(default=None, repr=False)
    _started: float = field(default_factory=time.monotonic, repr=False)
    _last_step: int | None = None
    """Of the last checkpoint, which may still be pending."""
    _written: int = 0
    _waited: float = 0.0
    """Seconds that training waited."""
    _background: float = 0.0
    """CPU seconds of the background thread."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the pending checkpoint; only note its failure.

        A finished run no longer needs it, and the error that ended another run is more important.
        """
        try:
            self.wait()
        except OSError as failure:
            note(self.folder.parent, f"the last checkpoint was not written ({failure})")

    @property
    def metrics(self) -> CheckpointMetrics:
        """Return how many checkpoints this process has written, and the time that took."""
        return CheckpointMetrics(
            written=self._written,
            seconds=round(self._waited, 3),
            background_seconds=round(self._background, 3),
        )

    def due(self) -> bool:
        """Return whether one more checkpoint stays within the fraction of the elapsed time.

        A collective: rank 0 decides, and every rank returns the same.

        Raises:
            OSError: the previous checkpoint could not be written.
        """
        is_writing = self._pending is not None and not self._pending.done()
        if not is_writing:
            self.wait()
        choice = [self.time_fraction == 1 or (not is_writing and self._is_affordable())]
        broadcast_object_list(choice)
        return bool(choice[0])

    def save(self, engine: Engine, step: int, loss: float) -> None:
        """Save the state after `step` steps.

        A collective: every rank calls it. It returns when the state is copied or written.

        Args:
            engine: what is trained.
            step: optimizer steps taken.
            loss: mean of the last steps; the checkpoint with the lowest one is the best.

        Raises:
            OSError: this checkpoint, or the previous one, could not be written.
        """
        random_states = engine.gather(random_state())
        started = time.monotonic()
        files = full_state(engine, random_states)
        if not engine.is_first:
            if engine.zero_stage:  # rank 0 gathers each tensor from all ranks
                for _ in files:
                    pass
            return
        self.wait()
        values = {"step": step, "loss": loss, "ranks": engine.ranks}
        if free_memory_bytes() > HEADROOM * self._bytes:
            copies = list(files)
            self._pending = self._writer.submit(self._write_in_background, step, copies, values)
        else:
            self._write(step, files, values)
        self._last_step = step
        self._written += 1
        self._waited += time.monotonic() - started

    def wait(self) -> None:
        """Wait for the pending checkpoint; raise the error of writing it."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that exist or are pending. On rank 0."""
        steps = checkpoint_steps(self.folder)
        return steps if self._last_step is None else [*steps, self._last_step]

    def discard(self) -> None:
        """Remove all checkpoints: the run has ended and its output is saved."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _bytes(self) -> int:
        return STATE_BYTES * self.trained_weights

    def _is_affordable(self) -> bool:
        spent = self._waited + self._background
        cost = spent / self._written if self._written else self._bytes / BYTES_PER_SECOND
        elapsed = time.monotonic() - self._started
        return spent + cost <= self.time_fraction * elapsed

    def _write_in_background(
        self, step: int, files: list[tuple[str, Tensors]], values: dict[str, Any]
    ) -> None:
        started = time.thread_time()
        self._write(step, files, values)
        self._background += time.thread_time() - started

    def _write(
        self, step: int, files: Iterable[tuple[str, Tensors]], values: dict[str, Any]
    ) -> None:
        write_checkpoint(self.folder / folder_name(step), files, values)
        remove_old(self.folder, self.keep)
