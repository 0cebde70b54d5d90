"""What a run leaves behind is ended, whoever asks, and only that; Ctrl-C is called Cancelled, and a killed run Crashed."""

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

from pipelines.orchestration import cancellation
from pipelines.orchestration.cancellation import (
    FLOW_RUN,
    end_with_worker,
    hold_lock,
    kill_leftover_processes,
    mark_interrupted_run_cancelled,
    mark_orphaned_runs_crashed,
)
from pipelines.workflow.flows import finetune

LOCKED = (
    "import sys, time; from types import SimpleNamespace; from pipelines.orchestration.cancellation import hold_lock\n"
    "hold_lock(None, SimpleNamespace(id=sys.argv[1]), None); print('held', flush=True); time.sleep(60)"
)
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def started() -> "Iterator[Callable[..., subprocess.Popen[bytes]]]":
    """Return what starts a process in a session of its own, as a rank is; all are ended after the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(run: UUID | None, argv: list[str] = SLEEP) -> "subprocess.Popen[bytes]":
        env = {**os.environ, **({FLOW_RUN: str(run)} if run else {})}
        processes.append(
            subprocess.Popen(argv, env=env, start_new_session=True, stdout=subprocess.PIPE)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


class Server:
    """A stand-in: the states of the runs that it knows, and those that it was told of others."""

    def __init__(self) -> None:
        self.states: dict[UUID, State] = {}

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None: ...

    def read_flow_run(self, run: UUID) -> Any:
        if run not in self.states:
            raise ObjectNotFound(Exception())
        return SimpleNamespace(id=run, state=self.states[run])

    def set_flow_run_state(self, run: UUID, state: State, force: bool) -> None:
        assert force
        self.states[run] = state

    def called(self) -> list[str]:
        """Return what each run is called."""
        return [state.type.value for state in self.states.values()]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """Return a stand-in of the server, of runs that no worker started."""
    one = Server()
    monkeypatch.setattr(cancellation, "get_client", lambda sync_client: one)
    monkeypatch.delenv(FLOW_RUN, raising=False)
    return one


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of locks under a Prefect home of its own, which processes that are started have too."""
    monkeypatch.setattr(cancellation, "PREFECT_HOME", SimpleNamespace(value=lambda: tmp_path))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    return tmp_path / "at_work" / gethostname()


def flow_run(name: UUID) -> Any:
    return SimpleNamespace(id=name)


def test_what_a_run_left_is_ended_and_nothing_else(
    started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = uuid4()
    left, others, none = started(run), started(uuid4()), started(None)
    monkeypatch.setenv(FLOW_RUN, str(run))  # this process is of the run as well, and goes on
    kill_leftover_processes(finetune, flow_run(run), State(type="CRASHED"))
    assert left.poll() is not None
    assert others.poll() is None and none.poll() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interruption_is_called_cancelled(server: Server, error: BaseException) -> None:
    interrupted(error)
    assert server.called() == ["CANCELLED"]


def test_a_crash_is_not(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(MemoryError())
    monkeypatch.setenv(FLOW_RUN, str(uuid4()))  # under a worker, which tells for itself
    interrupted(KeyboardInterrupt())
    assert server.called() == []


def interrupted(error: BaseException) -> None:
    """Call the hook as the engine does, which handles the error meanwhile."""
    try:
        raise error
    except BaseException:  # noqa: BLE001
        mark_interrupted_run_cancelled(finetune, flow_run(uuid4()), State(type="CRASHED"))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux is asked")
def test_a_flow_is_asked_to_end_when_its_worker_is_gone(started: Callable[..., Any]) -> None:
    flow = (
        "import os, signal, sys, time; from pipelines.orchestration.cancellation import end_with_worker\n"
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'asked\\n'), sys.exit()))\n"
        "end_with_worker(None, None, None); print('ready', flush=True); time.sleep(60)"
    )
    worker = started(
        uuid4(),
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {flow!r}])",
        ],
    )
    assert worker.stdout.readline() == b"ready\n"
    worker.kill()
    assert worker.stdout.readline() == b"asked\n"


def test_the_flow_has_its_hooks() -> None:
    assert finetune.on_running_hooks == [end_with_worker, hold_lock]
    assert finetune.on_cancellation_hooks == [kill_leftover_processes]
    assert finetune.on_crashed_hooks == [kill_leftover_processes, mark_interrupted_run_cancelled]


def test_a_run_is_called_crashed_when_its_process_is_gone(
    server: Server, locks: Path, started: Callable[..., Any]
) -> None:
    run = uuid4()
    server.states[run] = Running()
    process = started(None, [sys.executable, "-c", LOCKED, str(run)])
    assert process.stdout.readline() == b"held\n"
    mark_orphaned_runs_crashed("http://team/api")
    assert server.called() == ["RUNNING"] and [path.name for path in locks.iterdir()] == [str(run)]
    process.kill()
    process.wait()
    mark_orphaned_runs_crashed("http://team/api")
    assert server.called() == ["CRASHED"] and not list(locks.iterdir())


def test_a_run_that_told_how_it_ended_is_left_at_that(server: Server, locks: Path) -> None:
    run = uuid4()
    locks.mkdir(parents=True)
    (locks / str(run)).touch()
    server.states[run] = Cancelled()
    mark_orphaned_runs_crashed("http://team/api")
    assert server.called() == ["CANCELLED"] and not list(locks.iterdir())


def test_a_run_of_another_server_is_left_to_it(server: Server, locks: Path) -> None:
    locks.mkdir(parents=True)
    (locks / str(uuid4())).touch()
    mark_orphaned_runs_crashed("http://team/api")
    assert server.called() == [] and len(list(locks.iterdir())) == 1


def test_a_worker_watches_over_its_runs_itself(
    locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FLOW_RUN, str(uuid4()))
    hold_lock(finetune, flow_run(uuid4()), Running())
    assert not locks.exists()


def test_a_run_that_is_tried_again_holds_its_lock_already(
    locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FLOW_RUN, raising=False)
    monkeypatch.setattr(cancellation, "_held", {})
    run = flow_run(uuid4())
    for _ in range(2):
        hold_lock(finetune, run, Running())
    assert len(list(locks.iterdir())) == 1
    cancellation._held[run.id].close()
