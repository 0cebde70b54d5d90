"""Measure where a rank spends its time, phase by phase, and write the heartbeat that others read.

Phases nest: while one runs inside another, the outer clock is stopped, so the phases of a step add
up to its time. Collectives are timed where Python calls them; under DDP and on GPUs they overlap
with computation, and what counts is the time that a rank waits for them. Every other phase
synchronizes the GPU when it begins and ends. Otherwise the time of the backward pass would count
towards the phase that waits for it.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.runtime.heartbeats import COMMUNICATION, HeartbeatWriter

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "gather",
    "reduce_scatter_tensor",
    "reduce",
    "broadcast",
    "barrier",
)


class PhaseTimer:
    """The phases of one rank."""

    def __init__(self, heartbeat: HeartbeatWriter | None) -> None:
        """Start without an open phase; without a writer, no heartbeat is written."""
        self.heartbeat = heartbeat
        self.step = 0
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block, less that of phases inside it."""
        _synchronize(name)
        self._switch(lambda: self._open.append(name))
        try:
            yield
            _synchronize(name)
        finally:
            self._switch(self._open.pop)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are a phase."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **options)

        return call

    def collect(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, and reset them.

        A checkpoint or a snapshot follows a step, so its time is collected with the next step.
        """
        seconds = self._seconds
        self._seconds = {}
        return {name: round(value, 4) for name, value in seconds.items()}

    def watch_collectives(self) -> None:
        """From now on, count the time in this process's collectives as communication."""
        for name in COLLECTIVES:
            collective = getattr(torch.distributed, name)
            setattr(torch.distributed, name, self.timed(COMMUNICATION, collective))

    def _switch(self, change: Callable[..., Any]) -> None:
        """Add the time since the last switch to the innermost phase, then open or close one."""
        now = time.perf_counter()
        if self._open:
            current = self._open[-1]
            self._seconds[current] = self._seconds.get(current, 0.0) + now - self._since
        change()
        self._since = now
        if self.heartbeat is not None and self._open:
            self.heartbeat.beat(self.step, self._open[-1])


def _synchronize(phase: str) -> None:
    """Wait for the GPU, except in a collective, which must not wait for earlier work."""
    if phase != COMMUNICATION and torch.cuda.is_initialized():
        torch.cuda.synchronize()
