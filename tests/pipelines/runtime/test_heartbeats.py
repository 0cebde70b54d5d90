"""A stall is detected from heartbeats, and the error names the blocking rank."""

import os
import time
from pathlib import Path

import pytest

from pipelines.errors import StageError
from pipelines.runtime.heartbeats import (
    Heartbeat,
    HeartbeatWriter,
    StallDetector,
    clear_heartbeats,
    describe_blocking_ranks,
    read_heartbeats,
)
from pipelines.runtime.monitor import START_SECONDS, START_WARNING_SECONDS, StallMonitor


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A monotonic clock that the test advances."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def beat(rank: int, step: int, phase: str, beats: int = 1) -> Heartbeat:
    return Heartbeat(rank=rank, host=f"node-{rank}", process=1, step=step, phase=phase, beats=beats)


def test_a_heartbeat_is_read_as_it_was_written(tmp_path: Path) -> None:
    writer = HeartbeatWriter(tmp_path, 1, "node-b")
    writer.beat(3, "forward")
    writer.beat(12, "a phase with a longer name than before")
    writer.beat(12, "data")
    assert read_heartbeats(tmp_path) == [
        Heartbeat(rank=1, host="node-b", process=os.getpid(), step=12, phase="data", beats=3)
    ]
    clear_heartbeats(tmp_path)
    assert read_heartbeats(tmp_path) == []


def test_a_file_that_is_being_written_is_skipped(tmp_path: Path) -> None:
    HeartbeatWriter(tmp_path, 0, "node-a").beat(1, "data")
    (tmp_path / "ranks" / "rank-1.json").write_text("")
    assert [one.rank for one in read_heartbeats(tmp_path)] == [0]


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
        ([], ["no rank has started"]),
    ],
    ids=[
        "one computes while another waits",
        "one behind",
        "all wait",
        "one in an earlier collective",
        "none",
    ],
)
def test_the_blocking_ranks_are_described(beats: list[Heartbeat], named: list[str]) -> None:
    assert describe_blocking_ranks(beats) == named


def test_a_stall_counts_only_time_without_progress(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = [HeartbeatWriter(tmp_path, rank, "node") for rank in range(2)]
    detector = StallDetector(tmp_path)
    clock[0] += 500
    assert detector.stalled_seconds() == 500, "no rank has started"
    assert not detector.has_started
    for writer in writers:
        writer.beat(1, "forward")
    assert detector.stalled_seconds() == 0
    clock[0] += 40
    monkeypatch.setattr(time, "time", lambda: -1e9)  # a wall clock that jumps has no effect
    assert detector.stalled_seconds() == 40
    writers[1].beat(1, "backward")
    assert detector.stalled_seconds() == 0


def test_a_stall_is_reported_once_and_then_aborts_the_run(
    tmp_path: Path, clock: list[float]
) -> None:
    writer = HeartbeatWriter(tmp_path, 0, "node-a")
    detector = StallDetector(tmp_path)
    reported: list[str] = []
    monitor = StallMonitor(60, 300, reported.append)
    writer.beat(4, "forward")
    for _ in range(4):
        monitor.check(detector)
        clock[0] += 60
    assert reported == ["rank 0 on node-a is in forward of step 4; nothing has moved for 60 s"]
    writer.beat(5, "data")
    monitor.check(detector)
    clock[0] += 61
    monitor.check(detector)
    assert len(reported) == 2, "a second stall is reported again"
    clock[0] += 300
    with pytest.raises(
        StageError,
        match=r"rank 0 on node-a is in data of step 5; .* longer than launch.timeout_seconds 300",
    ) as ended:
        monitor.check(detector)
    assert ended.value.kind == "PeerError"


def test_a_start_that_takes_too_long_is_reported_and_ended(
    tmp_path: Path, clock: list[float]
) -> None:
    reports: list[str] = []
    stall_monitor = StallMonitor(warn_after=8, abort_after=50, report=reports.append)
    detector = StallDetector(tmp_path)
    clock[0] += START_WARNING_SECONDS - 1
    stall_monitor.check(detector)
    assert reports == []
    clock[0] += 2
    stall_monitor.check(detector)
    assert "no rank has started" in reports[0]
    clock[0] += START_SECONDS
    with pytest.raises(StageError, match="no rank has started; nothing has moved for 1021 s"):
        stall_monitor.check(detector)
