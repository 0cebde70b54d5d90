"""A stall is told by beats, whatever the clocks say, and the rank that is named is the one that the others wait for."""

import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import StageError
from pipelines.runtime.heartbeats import Pulse, Stalls, clear, culprit_words, read_beats
from pipelines.runtime.launcher import StallMonitor


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A monotonic clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def beat(rank: int, step: int, phase: str, beats: int = 1) -> dict[str, Any]:
    return {"rank": rank, "host": f"node-{rank}", "step": step, "phase": phase, "beats": beats}


def test_a_beat_is_read_as_it_was_written(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, 1, "node-b")
    pulse.beat(3, "forward")
    pulse.beat(12, "a phase with a longer name than before")
    pulse.beat(12, "data")
    assert read_beats(tmp_path) == [
        {"rank": 1, "host": "node-b", "step": 12, "phase": "data", "beats": 3}
    ]
    clear(tmp_path)
    assert read_beats(tmp_path) == []


def test_a_file_that_is_being_written_is_passed_over(tmp_path: Path) -> None:
    Pulse(tmp_path, 0, "node-a").beat(1, "data")
    (tmp_path / "ranks" / "rank-1.json").write_text("")
    assert [one["rank"] for one in read_beats(tmp_path)] == [0]


@pytest.mark.parametrize(
    ("beats", "named"),
    [
        (
            [beat(0, 7, "communication"), beat(1, 7, "forward")],
            ["rank 1 on node-1 is in forward of step 7"],
        ),
        (
            [beat(0, 8, "data"), beat(1, 7, "communication")],
            ["rank 1 on node-1 is in communication of step 7"],
        ),
        (
            [beat(0, 7, "communication"), beat(1, 7, "communication")],
            [
                "rank 0 on node-0 is in communication of step 7",
                "rank 1 on node-1 is in communication of step 7",
            ],
        ),
        (
            [beat(0, 7, "communication", 90), beat(1, 7, "communication", 88)],
            ["rank 1 on node-1 is in communication of step 7"],
        ),
        ([], ["no rank has begun"]),
    ],
    ids=[
        "one at work while another waits",
        "one behind",
        "all wait",
        "one in an earlier collective",
        "nobody",
    ],
)
def test_who_holds_the_others_up(beats: list[dict[str, Any]], named: list[str]) -> None:
    assert culprit_words(beats) == named


def test_time_counts_only_while_no_rank_moves(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pulses, stalls = [Pulse(tmp_path, rank, "node") for rank in range(2)], Stalls(tmp_path)
    clock[0] += 500
    assert stalls.seconds() == 0, "nothing has begun"
    for pulse in pulses:
        pulse.beat(1, "forward")
    assert stalls.seconds() == 0
    clock[0] += 40
    monkeypatch.setattr(time, "time", lambda: -1e9)  # a wall clock that jumps is not asked
    assert stalls.seconds() == 40
    pulses[1].beat(1, "backward")
    assert stalls.seconds() == 0


def test_a_stall_is_said_once_and_then_ends_the_run(tmp_path: Path, clock: list[float]) -> None:
    pulse, stalls, said = Pulse(tmp_path, 0, "node-a"), Stalls(tmp_path), list[str]()
    monitor = StallMonitor(60, 300, said.append)
    pulse.beat(4, "forward")
    for _ in range(4):
        monitor.check(stalls)
        clock[0] += 60
    assert said == ["rank 0 on node-a is in forward of step 4; nothing has moved for 60 s"]
    pulse.beat(5, "data")
    monitor.check(stalls)
    clock[0] += 61
    monitor.check(stalls)
    assert len(said) == 2, "another stall is news"
    clock[0] += 300
    with pytest.raises(
        StageError,
        match=r"rank 0 on node-a is in data of step 5; .* longer than launch.timeout_seconds 300",
    ) as ended:
        monitor.check(stalls)
    assert ended.value.kind == "PeerError"
