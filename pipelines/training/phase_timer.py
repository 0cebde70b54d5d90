"""Where a rank's time goes, phase by phase, and the beat by which others see what it does.

Phases lie in each other: while one runs inside another, the outer one's clock stands, so that the phases of a step add up to
its time. Collectives are timed where Python calls them; under DDP and on GPUs they run beside the computation, and what is
counted is the time that a rank waits for them. Every other phase begins and ends when the GPU has done what it was given, so
that the backward pass is not counted where its end is waited for.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.runtime.heartbeats import COMMUNICATION, Pulse

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
    """One rank's phases."""

    def __init__(self, pulse: Pulse | None) -> None:
        """Beat into a file; without one, only the time is kept."""
        self.pulse, self.step = pulse, 0
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block, less that of phases inside it."""
        _settle(name)
        self._turn(lambda: self._open.append(name))
        try:
            yield
            _settle(name)
        finally:
            self._turn(self._open.pop)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are a phase."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **options)

        return call

    def collect(self) -> dict[str, float]:
        """Return the seconds of each phase since the last lap, and begin anew.

        What comes after a step, a checkpoint or a snapshot, so falls into the lap of the next one.
        """
        seconds, self._seconds = self._seconds, {}
        return {name: round(value, 4) for name, value in seconds.items()}

    def watch_collectives(self) -> None:
        """Count as communication what this process spends in collectives from now on."""
        for name in COLLECTIVES:
            setattr(
                torch.distributed, name, self.timed(COMMUNICATION, getattr(torch.distributed, name))
            )

    def _turn(self, change: Callable[..., Any]) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] = (
                self._seconds.get(self._open[-1], 0.0) + now - self._since
            )
        change()
        self._since = now
        if self.pulse is not None and self._open:
            self.pulse.beat(self.step, self._open[-1])


def _settle(phase: str) -> None:
    if phase != COMMUNICATION and torch.cuda.is_initialized():
        torch.cuda.synchronize()
