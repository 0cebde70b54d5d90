"""Follow a running child: pass on its metrics and notes, and detect a stall. Imports no torch."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.console import Watch
from pipelines.errors import PeerError, StageError
from pipelines.runtime.forked_child import Child
from pipelines.runtime.heartbeats import StallDetector, clear_heartbeats, read_notes

POLL_SECONDS = 0.5
METRICS = "metrics.jsonl"
START_WARNING_SECONDS = 120.0
START_SECONDS = 900.0
"""Least time for the ranks to import, load the base and connect; a larger timeout takes its place.
"""


@dataclass
class StallMonitor:
    """Warns about a training without progress, and aborts it later."""

    warn_after: float
    """Seconds."""
    abort_after: float
    """Seconds."""
    report: Callable[[str], None]
    _warned: bool = False
    _notes_reported: int = 0

    def check(self, detector: StallDetector) -> None:
        """Report new notes of the run, and once per stall the rank that blocks the others.

        Raises:
            StageError: the stall lasts longer than `abort_after`, or the start than START_SECONDS.
        """
        for text in read_notes(detector.folder, self._notes_reported):
            self._notes_reported += 1
            self.report(text)
        seconds = detector.stalled_seconds()
        warn_after = self.warn_after
        abort_after = self.abort_after
        limit = f"launch.timeout_seconds {abort_after:g}"
        if not detector.has_started:
            warn_after = max(warn_after, START_WARNING_SECONDS)
            abort_after = max(abort_after, START_SECONDS)
            limit = f"the {abort_after:g} s in which ranks must start"
        if seconds < warn_after:
            self._warned = False
        elif not self._warned:
            self._warned = True
            self.report(detector.describe())
        if seconds > abort_after:
            raise StageError(
                f"{detector.describe()}, longer than {limit}; "
                "check its host and run again: training resumes from the last checkpoint",
                kind=PeerError.__name__,
            )


def follow(
    child: Child,
    folder: Path,
    *,
    watch: Watch | None = None,
    stall_monitor: StallMonitor | None = None,
) -> None:
    """Wait for a child to end; until then pass on rows of metrics.jsonl and check for a stall.

    Args:
        child: the process.
        folder: folder of its (first) stage.
        watch: called with each new row.
        stall_monitor: aborts a stalled training; without it a stall has no limit.
    """
    rows = _new_rows(folder / METRICS)
    detector = StallDetector(folder)
    clear_heartbeats(folder)
    while True:
        has_ended = child.poll() is not None
        if stall_monitor is not None:
            stall_monitor.check(detector)
        for row in rows:
            if row is None:
                break
            if watch is not None:
                watch(row)
        if has_ended:
            return
        time.sleep(POLL_SECONDS)


def _new_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield each complete row once, and None whenever all rows were yielded."""
    last_step = 0
    while True:
        for row in _complete_rows(path):
            if row["step"] > last_step:
                last_step = row["step"]
                yield row
        yield None


def _complete_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
