"""Leftover processes are killed; interrupted runs become Cancelled, killed ones Crashed."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import gethostname
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Running
from prefect_host import until

from pipelines.orchestration import cancellation
from pipelines.orchestration.cancellation import (
    FLOW_RUN,
    hold_lock,
    kill_leftover_processes,
    mark_interrupted_run_cancelled,
    mark_orphaned_runs_crashed,
    outlive_worker,
)
from pipelines.orchestration.events import announce_failure
from pipelines.orchestration.own_state import CancelledByServerError
from pipelines.workflow.flows import finetune

LOCKED = """
import sys, time
from types import SimpleNamespace
from pipelines.orchestration.cancellation import hold_lock

hold_lock(None, SimpleNamespace(id=sys.argv[1]), None)
print('held', flush=True)
time.sleep(60)
"""
FLOW = """
import os, sys, time
from pathlib import Path
from pipelines.orchestration.cancellation import outlive_worker

outlive_worker(None, None, None)
worker = os.getppid()
print('ready', flush=True)
while os.getppid() == worker:
    time.sleep(0.05)
for _ in range(3):
    print('nobody reads this', flush=True)
Path(sys.argv[1]).write_text('alive')
"""
WORKER = f"""
import subprocess, sys

flow = subprocess.Popen([sys.executable, '-c', {FLOW!r}, sys.argv[1]], stdout=subprocess.PIPE)
print(flow.stdout.readline().decode(), end='', flush=True)
flow.wait()
"""
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def started() -> "Iterator[Callable[..., subprocess.Popen[bytes]]]":
    """Return a function that starts a process in a separate session, as for a rank."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(run: UUID | None, argv: list[str] = SLEEP) -> "subprocess.Popen[bytes]":
        environment = dict(os.environ)
        if run is not None:
            environment[FLOW_RUN] = str(run)
        process = subprocess.Popen(
            argv, env=environment, start_new_session=True, stdout=subprocess.PIPE
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


class FakeServer:
    """A fake server with the states of its runs, and the states that clients have set."""

    def __init__(self) -> None:
        self.states: dict[UUID, State] = {}

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None: ...

    def read_flow_run(self, run: UUID) -> Any:
        if run not in self.states:
            raise ObjectNotFound(Exception())
        return SimpleNamespace(id=run, state=self.states[run])

    def set_flow_run_state(self, run: UUID, state: State, force: bool) -> None:
        assert force
        self.states[run] = state

    def state_names(self) -> list[str]:
        """Return the state of each run."""
        return [state.type.value for state in self.states.values()]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """Return a fake server, for runs that no worker started."""
    server = FakeServer()
    monkeypatch.setattr(cancellation, "get_client", lambda sync_client: server)
    monkeypatch.delenv(FLOW_RUN, raising=False)
    return server


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of locks in a temporary PREFECT_HOME, which child processes use too."""
    monkeypatch.setattr(cancellation, "PREFECT_HOME", SimpleNamespace(value=lambda: tmp_path))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    return tmp_path / "at_work" / gethostname()


def flow_run(name: UUID) -> Any:
    return SimpleNamespace(id=name)


def test_leftover_processes_are_killed_and_no_others(
    started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = uuid4()
    leftover = started(run)
    other = started(uuid4())
    unrelated = started(None)
    monkeypatch.setenv(FLOW_RUN, str(run))  # this process belongs to the run too, and survives
    kill_leftover_processes(finetune, flow_run(run), State(type="CRASHED"))
    assert leftover.poll() is not None
    assert other.poll() is None
    assert unrelated.poll() is None


def test_a_run_that_ends_itself_when_it_is_cancelled_is_marked_cancelled(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FLOW_RUN, str(uuid4()))  # its worker is gone
    interrupted(CancelledByServerError())
    assert server.state_names() == ["CANCELLED"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_run_is_marked_cancelled(server: FakeServer, error: BaseException) -> None:
    interrupted(error)
    assert server.state_names() == ["CANCELLED"]


def test_a_crash_is_not_marked_cancelled(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(MemoryError())
    monkeypatch.setenv(FLOW_RUN, str(uuid4()))  # a worker reports the state itself
    interrupted(KeyboardInterrupt())
    assert server.state_names() == []


def interrupted(error: BaseException) -> None:
    """Call the hook as the engine does, while it handles the error."""
    try:
        raise error
    except BaseException:  # noqa: BLE001
        mark_interrupted_run_cancelled(finetune, flow_run(uuid4()), State(type="CRASHED"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl of Linux")
def test_a_flow_outlives_the_worker_that_reads_its_output(
    started: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "state.txt"
    worker = started(uuid4(), [sys.executable, "-c", WORKER, str(file)])
    assert worker.stdout.readline() == b"ready\n"
    worker.kill()
    until(file.exists, seconds=30)


def test_the_flow_has_its_hooks() -> None:
    assert finetune.on_running_hooks == [outlive_worker, hold_lock]
    assert finetune.on_cancellation_hooks == [kill_leftover_processes]
    assert finetune.on_failure_hooks == [announce_failure]
    assert finetune.on_crashed_hooks == [
        kill_leftover_processes,
        mark_interrupted_run_cancelled,
        announce_failure,
    ]


def test_a_run_is_marked_crashed_when_its_process_is_gone(
    server: FakeServer, locks: Path, started: Callable[..., Any]
) -> None:
    run = uuid4()
    server.states[run] = Running()
    process = started(None, [sys.executable, "-c", LOCKED, str(run)])
    assert process.stdout.readline() == b"held\n"
    mark_orphaned_runs_crashed("http://team/api")
    assert server.state_names() == ["RUNNING"]
    assert [path.name for path in locks.iterdir()] == [str(run)]
    process.kill()
    process.wait()
    mark_orphaned_runs_crashed("http://team/api")
    assert server.state_names() == ["CRASHED"]
    assert not list(locks.iterdir())


def test_the_state_of_a_finished_run_is_kept(server: FakeServer, locks: Path) -> None:
    run = uuid4()
    locks.mkdir(parents=True)
    (locks / str(run)).touch()
    server.states[run] = Cancelled()
    mark_orphaned_runs_crashed("http://team/api")
    assert server.state_names() == ["CANCELLED"]
    assert not list(locks.iterdir())


def test_a_run_of_another_server_is_ignored(server: FakeServer, locks: Path) -> None:
    locks.mkdir(parents=True)
    (locks / str(uuid4())).touch()
    mark_orphaned_runs_crashed("http://team/api")
    assert server.state_names() == []
    assert len(list(locks.iterdir())) == 1


def test_under_a_worker_a_run_holds_no_lock(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FLOW_RUN, str(uuid4()))
    hold_lock(finetune, flow_run(uuid4()), Running())
    assert not locks.exists()


def test_a_retried_run_holds_its_lock_already(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FLOW_RUN, raising=False)
    monkeypatch.setattr(cancellation, "_locks", {})
    run = flow_run(uuid4())
    for _ in range(2):
        hold_lock(finetune, run, Running())
    assert len(list(locks.iterdir())) == 1
    cancellation._locks[run.id].release()
