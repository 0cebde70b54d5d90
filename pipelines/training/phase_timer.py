"""Measure where a rank spends its time, phase by phase, and write the heartbeat that others read.

Phases nest: while one runs inside another, the outer clock is stopped, so the phases of a step add
up to its time. No phase waits for the GPU. There, a phase lasts from one CUDA event of the stream
to another, and is read after the GPU has passed both; what it has not reached when a step's phases
are collected counts towards the next step.

The phase `communication` covers the collectives that a training calls itself, through its engine
(see `pipelines.training.engine`), and DDP's reduction of gradients on CPUs. Other collectives count
towards the phase in which they are called: DDP's reduction on GPUs overlaps with the backward pass,
and DeepSpeed offers no hook. (Its communication logger waits for the device after each collective,
and the functions that it calls cannot be exchanged without patching them.)
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipelines.runtime.heartbeats import HeartbeatWriter

MILLISECONDS_PER_SECOND = 1000


class PhaseClock(Protocol):
    """Marks points in time, and measures between two of them."""

    def mark(self) -> Any:
        """Return a mark of the present."""

    def seconds(self, start: Any, end: Any) -> float | None:
        """Return the seconds between two marks; None while the second one is in the future."""


class HostClock:
    """The time of the host: on a CPU, a call returns when its work is done."""

    def mark(self) -> float:
        """Return the seconds of a clock that never goes back."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float | None:
        """Return the seconds between two marks."""
        return end - start


class CudaClock:
    """The time of the current CUDA stream, which runs behind the host."""

    def mark(self) -> torch.cuda.Event:
        """Return an event that the GPU records after the work so far; does not wait for it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        """Return the seconds between two events; None if the GPU has not reached the second one."""
        if not end.query():
            return None
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / MILLISECONDS_PER_SECOND


def clock_of(device: torch.device) -> PhaseClock:
    """Return the clock by which work on a device is timed."""
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class _Interval:
    """Time spent in one phase without interruption, between two marks of the clock."""

    phase: str
    start: Any
    end: Any


class PhaseTimer:
    """The phases of one rank."""

    def __init__(self, heartbeat: HeartbeatWriter | None, clock: PhaseClock) -> None:
        """Start without an open phase.

        Args:
            heartbeat: gets the step and each phase that begins; None to write no heartbeat.
            clock: see `clock_of`.
        """
        self.heartbeat = heartbeat
        self.step = 0
        self._clock = clock
        self._intervals: list[_Interval] = []
        """Not yet collected."""
        self._open: list[str] = []
        self._since: Any = None
        """When the innermost open phase began or resumed."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block, less that of phases inside it."""
        self._switch(lambda: self._open.append(name))
        try:
            yield
        finally:
            self._switch(self._open.pop)

    def collect(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, and reset them.

        A checkpoint or a snapshot follows a step, so its time is collected with the next step.
        """
        collected: dict[str, float] = {}
        pending: list[_Interval] = []
        for interval in self._intervals:
            seconds = self._clock.seconds(interval.start, interval.end)
            if seconds is None:
                pending.append(interval)
                continue
            earlier = collected.get(interval.phase, 0.0)
            collected[interval.phase] = earlier + seconds
        self._intervals = pending
        return {name: round(seconds, 4) for name, seconds in collected.items()}

    def discard(self) -> None:
        """Forget the phases since the last call of `collect`: they belong to no step."""
        self._intervals = []

    def _switch(self, change: Callable[..., Any]) -> None:
        """End the interval of the innermost phase, then open or close one."""
        now = self._clock.mark()
        if self._open:
            self._intervals.append(_Interval(self._open[-1], self._since, now))
        change()
        self._since = now
        if self.heartbeat is not None and self._open:
            self.heartbeat.beat(self.step, self._open[-1])
