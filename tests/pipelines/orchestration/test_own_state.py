"""A run ends by its state on the server: cancelled, suspended at a checkpoint, or taken over."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause, TerminationSignal
from prefect.states import Cancelling, Running, Scheduled, Suspended

from pipelines.orchestration import own_state
from pipelines.orchestration.own_state import (
    CancelledByServerError,
    SuspendedByServerError,
    follow_state,
    training_in,
)

SECONDS = 10


class FakeServer:
    """A fake server with the state of one run."""

    def __init__(self) -> None:
        self.state: State = Running()
        self.run_count = 1
        self.reads = 0
        self.is_away = False

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None: ...

    def read_flow_run(self, run: object) -> Any:
        self.reads += 1
        if self.is_away:
            raise httpx.ConnectError("refused")
        return SimpleNamespace(state=self.state, run_count=self.run_count)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    found = FakeServer()
    monkeypatch.setattr(own_state, "get_client", lambda sync_client: found)
    monkeypatch.setattr(own_state, "POLL_SECONDS", 0.02)
    return found


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Path]:
    """The folder of a training in progress."""
    (tmp_path / "checkpoints").mkdir()
    with training_in(tmp_path):
        yield tmp_path


def work(until: Callable[[], bool] = lambda: False) -> None:
    """Stand for a run: wait in the main thread."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and not until():
        time.sleep(0.01)


def polls(server: FakeServer, count: int) -> Callable[[], bool]:
    """Return a condition: the server was read that many times from now on."""
    start = server.reads
    return lambda: server.reads >= start + count


def test_a_cancelled_run_without_its_worker_ends(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CancelledByServerError) as ended, follow_state(uuid4()):
        work(polls(server, 2))
        parent = os.getppid()
        monkeypatch.setattr(own_state.os, "getppid", lambda: parent + 1)
        server.state = Cancelling()
        work()
    assert isinstance(ended.value, TerminationSignal)


def test_a_worker_has_time_to_cancel_its_run(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_state, "POLLS_OF_WORKER", 1000)
    with follow_state(uuid4()):
        server.state = Cancelling()
        work(polls(server, 5))
    monkeypatch.setattr(own_state, "POLLS_OF_WORKER", 3)
    with pytest.raises(CancelledByServerError), follow_state(uuid4()):
        work()


def test_a_suspended_training_ends_after_its_next_checkpoint(
    server: FakeServer, training: Path
) -> None:
    (training / "checkpoints" / "step-10").mkdir()
    with pytest.raises(SuspendedByServerError) as ended, follow_state(uuid4()):
        work(polls(server, 2))
        server.state = Suspended()
        work(polls(server, 5))
        (training / "checkpoints" / "step-20.partial").mkdir()
        work(polls(server, 5))
        (training / "checkpoints" / "step-20").mkdir()
        work()
        pytest.fail("the run continues")
    assert isinstance(ended.value, Pause)


def test_a_suspended_run_without_a_training_ends_at_once(server: FakeServer) -> None:
    server.state = Suspended()
    with pytest.raises(SuspendedByServerError), follow_state(uuid4()):
        work()


@pytest.mark.parametrize("taken", ["scheduled", "started"])
def test_a_run_that_another_process_has_ends_at_once(
    server: FakeServer, training: Path, taken: str
) -> None:
    with pytest.raises(SuspendedByServerError), follow_state(uuid4()):
        work(polls(server, 2))
        if taken == "scheduled":
            server.state = Scheduled()
        else:
            server.run_count = 2
        work()


def test_a_server_that_is_away_changes_nothing(server: FakeServer) -> None:
    server.is_away = True
    with follow_state(uuid4()):
        work(polls(server, 5))
    with follow_state(None):
        pass
