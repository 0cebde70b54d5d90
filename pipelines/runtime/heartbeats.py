"""What each rank of a training is doing, in a small file of its own, and which one holds the others up. Imports no torch.

    <stage>/ranks/rank-1.json    {"rank": 1, "host": "node-b", "step": 7, "phase": "backward", "beats": 412}

A rank that waits for others is in the phase `communication`; the one that they wait for is in another, or behind.
Whether anything moves is told by the number of beats, so that neither a clock that jumps nor two hosts whose clocks differ
are taken for a stall.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RANKS, NOTES = "ranks", "notes.txt"
COMMUNICATION = "communication"
WIDTH = 256
"""Bytes of a file, which is written over in place: a beat costs one system call."""
Beat = dict[str, Any]


class Pulse:
    """Writes one rank's file."""

    def __init__(self, folder: Path, rank: int, host: str) -> None:
        path = folder / RANKS / f"rank-{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._fixed = {"rank": rank, "host": host[:100]}
        self._beats = 0

    def beat(self, step: int, phase: str) -> None:
        """Say what the rank begins to do."""
        self._beats += 1
        text = json.dumps({**self._fixed, "step": step, "phase": phase, "beats": self._beats})
        os.pwrite(self._file, text.encode().ljust(WIDTH), 0)


@dataclass
class Stalls:
    """Notices when no rank of a run has moved for a while."""

    folder: Path
    """The stage's."""
    _seen: dict[int, int] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Return how long no rank has moved."""
        beats = {beat["rank"]: beat["beats"] for beat in read_beats(self.folder)}
        if beats != self._seen or not beats:
            self._seen, self._since = beats, time.monotonic()
        return time.monotonic() - self._since

    def words(self) -> str:
        """Say which rank the others wait for, in which step and for how long."""
        seconds, beats = self.seconds(), read_beats(self.folder)
        return f"{'; '.join(culprit_words(beats))}; nothing has moved for {seconds:.0f} s"


def read_beats(folder: Path) -> list[Beat]:
    """Return the last beat of each rank; a file that is being written is passed over."""
    beats = []
    for path in sorted((folder / RANKS).glob("rank-*.json")):
        try:
            beats.append(json.loads(path.read_text()))
        except (ValueError, OSError):
            continue
    return beats


def clear(folder: Path) -> None:
    """Forget the ranks and the notes of a former run."""
    (folder / NOTES).unlink(missing_ok=True)
    for path in (folder / RANKS).glob("rank-*.json"):
        path.unlink(missing_ok=True)


def note(folder: Path, text: str) -> None:
    """Leave a line for whoever watches the run; it stands in the log as well, and there alone where the disk is full."""
    print(text, flush=True)
    with suppress(OSError), (folder / NOTES).open("a", encoding="utf-8") as stream:
        stream.write(text + "\n")


def read_notes(folder: Path, after: int) -> list[str]:
    """Return the lines that were left after the first `after`."""
    path = folder / NOTES
    return path.read_text(encoding="utf-8").splitlines()[after:] if path.is_file() else []


def culprit_words(beats: list[Beat]) -> list[str]:
    """Name the ranks that hold the others up: those that are behind, at work while the rest waits, or in an earlier collective.

    All ranks go through the same phases, so of those that wait in one step the one with fewer beats has stopped before the others.
    """
    if not beats:
        return ["no rank has begun"]
    first = min(beat["step"] for beat in beats)
    behind = [beat for beat in beats if beat["step"] == first]
    fewest = min(beat["beats"] for beat in behind)
    at_work = [beat for beat in behind if beat["phase"] != COMMUNICATION]
    earlier = [beat for beat in behind if beat["beats"] == fewest]
    return [
        f"rank {one['rank']} on {one['host']} is in {one['phase']} of step {one['step']}"
        for one in at_work or earlier
    ]
