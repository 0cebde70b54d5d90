"""Heartbeats: each rank writes its progress to a small file, to show which rank blocks.

    <stage>/ranks/rank-1.json
    {"rank": 1, "host": "node-b", "process": 4711, "step": 7, "phase": "backward", "beats": 412}

A rank that waits for others is in the phase `communication`; the rank that they wait for is in
another phase or in an earlier step. A rank that waits inside DeepSpeed is in the phase that called
it, and is listed together with the rank that it waits for. A stall is detected from the number of
heartbeats alone, so neither a clock that jumps nor two hosts with different clocks look like a
stall. Imports no torch.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.runtime.interfaces.values import Values

RANKS, NOTES = "ranks", "notes.txt"
COMMUNICATION = "communication"
WIDTH = 256
"""Bytes per file. The file is overwritten in place, so that a heartbeat costs one system call."""


class Heartbeat(Values):
    """The progress of one rank."""

    rank: int
    host: str
    process: int
    """Its id on the host."""
    step: int
    phase: str
    beats: int
    """Heartbeats so far."""


class HeartbeatWriter:
    """Writes one rank's file."""

    def __init__(self, folder: Path, rank: int, host: str) -> None:
        path = folder / RANKS / f"rank-{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._rank = rank
        self._host = host[:100]
        self._beats = 0

    def beat(self, step: int, phase: str) -> None:
        """Record the step and the phase that the rank starts.

        Args:
            step: number of the current optimizer step, from 1; 0 before the first.
            phase: of the step, such as backward.
        """
        self._beats += 1
        heartbeat = Heartbeat(
            rank=self._rank,
            host=self._host,
            process=os.getpid(),
            step=step,
            phase=phase,
            beats=self._beats,
        )
        os.pwrite(self._file, heartbeat.model_dump_json().encode().ljust(WIDTH), 0)


@dataclass
class StallDetector:
    """Measures how long no rank of a run has made progress."""

    folder: Path
    """Folder of the stage."""
    _last_beats: dict[int, int] = field(default_factory=dict)
    _since: float = field(default_factory=lambda: time.monotonic())

    @property
    def has_started(self) -> bool:
        """Return whether a rank has made progress since this object was created."""
        return bool(self._last_beats)

    def stalled_seconds(self) -> float:
        """Return for how many seconds no rank has made progress, or the run has been starting."""
        beats = {beat.rank: beat.beats for beat in read_heartbeats(self.folder)}
        if beats != self._last_beats:
            self._last_beats = beats
            self._since = time.monotonic()
        return time.monotonic() - self._since

    def describe(self) -> str:
        """Name the rank that the others wait for, its step, and for how long."""
        seconds = self.stalled_seconds()
        ranks = "; ".join(describe_blocking_ranks(read_heartbeats(self.folder)))
        return f"{ranks}; nothing has moved for {seconds:.0f} s"


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Return the last heartbeat of each rank; skip a file that is being written."""
    beats = []
    for path in sorted((folder / RANKS).glob("rank-*.json")):
        try:
            beats.append(Heartbeat.model_validate_json(path.read_text()))
        except (ValueError, OSError):
            continue
    return beats


def clear_heartbeats(folder: Path) -> None:
    """Delete the heartbeats and the notes of an earlier run."""
    (folder / NOTES).unlink(missing_ok=True)
    for path in (folder / RANKS).glob("rank-*.json"):
        path.unlink(missing_ok=True)


def note(folder: Path, text: str) -> None:
    """Write a line for the parent to print.

    The log gets it too, and is the only place if the disk is full.

    Args:
        folder: of the stage.
        text: one line.
    """
    print(text, flush=True)
    with suppress(OSError), (folder / NOTES).open("a", encoding="utf-8") as stream:
        stream.write(text + "\n")


def read_notes(folder: Path, after: int) -> list[str]:
    """Return the notes after the first `after`.

    Args:
        folder: of the stage.
        after: number of notes that are known already.
    """
    path = folder / NOTES
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8").splitlines()[after:]


def describe_blocking_ranks(beats: list[Heartbeat]) -> list[str]:
    """Describe the ranks that block the others.

    Candidates are the ranks in the lowest step. Those that compute while the rest communicates
    block the others. If all of them communicate, those with the fewest heartbeats do: every rank
    goes through the same phases, so they stopped in an earlier collective.
    """
    if not beats:
        return ["no rank has started"]
    lowest_step = min(beat.step for beat in beats)
    behind = [beat for beat in beats if beat.step == lowest_step]
    fewest_beats = min(beat.beats for beat in behind)
    computing = [beat for beat in behind if beat.phase != COMMUNICATION]
    in_earlier_collective = [beat for beat in behind if beat.beats == fewest_beats]
    return [
        f"rank {beat.rank} on {beat.host} is in {beat.phase} of step {beat.step}"
        for beat in computing or in_earlier_collective
    ]
