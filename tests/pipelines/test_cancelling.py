"""What a run leaves behind is ended, whoever asks, and only that; Ctrl-C is called Cancelled."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import State

from pipelines import cancelling
from pipelines.cancelling import FLOW_RUN, call_interruption_cancelled, end_what_is_left, end_with_worker
from pipelines.flows import finetune

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def started() -> "Iterator[Callable[..., subprocess.Popen[bytes]]]":
    """Return what starts a process in a session of its own, as a rank is; all are ended after the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(run: UUID | None, argv: list[str] = SLEEP) -> "subprocess.Popen[bytes]":
        env = {**os.environ, **({FLOW_RUN: str(run)} if run else {})}
        processes.append(subprocess.Popen(argv, env=env, start_new_session=True, stdout=subprocess.PIPE))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """Return the states that a stand-in of the server is told."""
    told: list[State] = []

    class Client:
        def __enter__(self) -> "Client":
            return self

        def __exit__(self, *_: object) -> None: ...

        def set_flow_run_state(self, _: UUID, state: State, force: bool) -> None:
            assert force
            told.append(state)

    monkeypatch.setattr(cancelling, "get_client", lambda sync_client: Client())
    monkeypatch.delenv(FLOW_RUN, raising=False)
    return told


def flow_run(name: UUID) -> Any:
    return SimpleNamespace(id=name)


def test_what_a_run_left_is_ended_and_nothing_else(started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = uuid4()
    left, others, none = started(run), started(uuid4()), started(None)
    monkeypatch.setenv(FLOW_RUN, str(run))  # this process is of the run as well, and goes on
    end_what_is_left(finetune, flow_run(run), State(type="CRASHED"))
    assert left.poll() is not None
    assert others.poll() is None and none.poll() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interruption_is_called_cancelled(states: list[State], error: BaseException) -> None:
    interrupted(error)
    assert [state.type for state in states] == ["CANCELLED"]


def test_a_crash_is_not(states: list[State], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(MemoryError())
    monkeypatch.setenv(FLOW_RUN, str(uuid4()))  # under a worker, which tells for itself
    interrupted(KeyboardInterrupt())
    assert states == []


def interrupted(error: BaseException) -> None:
    """Call the hook as the engine does, which handles the error meanwhile."""
    try:
        raise error
    except BaseException:  # noqa: BLE001
        call_interruption_cancelled(finetune, flow_run(uuid4()), State(type="CRASHED"))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux is asked")
def test_a_flow_is_asked_to_end_when_its_worker_is_gone(started: Callable[..., Any]) -> None:
    flow = (
        "import os, signal, sys, time; from pipelines.cancelling import end_with_worker\n"
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'asked\\n'), sys.exit()))\n"
        "end_with_worker(None, None, None); print('ready', flush=True); time.sleep(60)"
    )
    worker = started(uuid4(), [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {flow!r}])"])
    assert worker.stdout.readline() == b"ready\n"
    worker.kill()
    assert worker.stdout.readline() == b"asked\n"


def test_the_flow_has_its_hooks() -> None:
    assert finetune.on_running_hooks == [end_with_worker]
    assert finetune.on_cancellation_hooks == [end_what_is_left]
    assert finetune.on_crashed_hooks == [end_what_is_left, call_interruption_cancelled]


def test_a_child_of_the_start_does_not_hear_ctrl_c(monkeypatch: pytest.MonkeyPatch, started: Callable[..., Any]) -> None:
    class Client:
        def __enter__(self) -> None:
            self.server = started(None)

        def __exit__(self, *_: object) -> None:
            servers.append(self.server)

    servers: list[Any] = []
    monkeypatch.setattr(cancelling, "get_client", lambda sync_client: Client())
    cancelling.start_server()
    servers[0].send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert servers[0].poll() is None
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
