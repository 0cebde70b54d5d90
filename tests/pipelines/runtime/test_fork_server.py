"""A forked child is a process like any other: command, environment, output, status and end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from command import shared_imports_at

from pipelines.errors import PipelineError
from pipelines.runtime import shared_imports
from pipelines.runtime.fork_server import Request
from pipelines.runtime.forked_child import ForkedChild, ForkServer, ForkServerError, sees_gpu

PROBE = """
import json, os, signal, sys, time
import torch

def main():
    action, *rest = sys.argv[1:]
    if action == "report":
        facts = {"name": __name__, "arguments": rest, "folder": os.getcwd(),
                 "color": os.environ.get("COLOR"), "threads": torch.get_num_threads(),
                 "session": os.getsid(0), "pid": os.getpid(), "input": sys.stdin.read()}
        print(json.dumps(facts))
    elif action == "exit":
        sys.exit(int(rest[0]))
    elif action == "fail":
        raise ValueError("the probe fails")
    elif action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        time.sleep(60)

if __name__ == "__main__":
    main()
"""
Start = Callable[..., ForkedChild]
CHILD_OF_A_RUN = """
import os, sys
from pathlib import Path
from pipelines.runtime.forked_child import ForkServer

server = ForkServer(["probe"])
environment = {**os.environ, "LORA_RUN_PID": str(os.getpid())}
with open("log.txt", "wb") as log:
    argv = [sys.executable, "-m", "probe", "sleep"]
    child = server.start(argv, environment=environment, threads=1, log=log)
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forks")
    (folder / "probe.py").write_text(PROBE)
    return folder


@pytest.fixture(scope="module", params=["own", "shared imports"])
def server(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ForkServer]:
    server = ForkServer(["probe"])
    if request.param == "own":
        yield server
        server.close()
        return
    path = tmp_path_factory.mktemp("shared") / "socket"
    environment = {**os.environ, "PYTHONPATH": python_path(folder)}
    with shared_imports_at(path, environment), pytest.MonkeyPatch.context() as patch:
        patch.setenv(shared_imports.VARIABLE, str(path))
        yield server
        server.close()


@pytest.fixture
def start(folder: Path, server: ForkServer) -> Iterator[Start]:
    """Return a function that forks the probe; its output goes to log.txt."""
    children = []

    def run(*arguments: str, threads: int = 1, **variables: str) -> ForkedChild:
        environment = {**os.environ, "PYTHONPATH": python_path(folder), **variables}
        with (folder / "log.txt").open("wb") as log:
            argv = [sys.executable, "-m", "probe", *arguments]
            child = server.start(argv, environment=environment, threads=threads, log=log)
        children.append(child)
        return child

    yield run
    for child in children:
        child.kill()
        child.wait()


def python_path(folder: Path) -> str:
    return os.pathsep.join([str(folder), str(Path(__file__).resolve().parents[3])])


def test_a_child_has_its_own_command_session_and_threads(start: Start, folder: Path) -> None:
    child = start("report", "a", "b c", threads=2)
    assert child.wait(120) == 0
    facts = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    assert (facts["name"], facts["arguments"]) == ("__main__", ["a", "b c"])
    assert facts["folder"] == str(Path.cwd())
    assert (facts["threads"], facts["input"]) == (2, "")
    assert facts["pid"] == facts["session"] == child.pid


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(("exit", "0"), 0), (("exit", "3"), 3), (("die",), -signal.SIGKILL)],
)
def test_the_status_is_that_of_the_process(
    start: Start, arguments: tuple[str, ...], status: int
) -> None:
    child = start(*arguments)
    assert child.wait(120) == status
    assert child.poll() == child.returncode == status


def test_an_error_is_in_the_log_and_ends_only_this_child(start: Start, folder: Path) -> None:
    assert start("fail").wait(120) == 1
    assert "ValueError: the probe fails" in (folder / "log.txt").read_text()
    assert start("exit", "0").wait(60) == 0


def test_a_child_can_be_waited_for_with_a_limit_and_terminated(start: Start) -> None:
    child = start("sleep")
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.1)
    child.terminate()
    assert child.wait(30) == -signal.SIGTERM


def test_another_environment_gets_another_server(start: Start, folder: Path) -> None:
    running = start("sleep")
    with pytest.raises(ForkServerError, match="another environment"):
        start("report", COLOR="red")
    running.kill()
    running.wait()
    assert start("report", COLOR="red").wait(120) == 0
    assert json.loads((folder / "log.txt").read_text().splitlines()[-1])["color"] == "red"


def test_shared_imports_are_used(start: Start, server: ForkServer) -> None:
    child = start("sleep")
    command = psutil.Process(child.pid).cmdline()
    is_shared = shared_imports.VARIABLE in os.environ
    assert (shared_imports.__name__ in command) == is_shared


def test_a_socket_on_which_nothing_listens_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(shared_imports.VARIABLE, str(folder / "nowhere"))
    with (
        pytest.raises(PipelineError, match=r"nowhere', where no process listens .* or unset"),
        (folder / "log.txt").open("wb") as log,
    ):
        argv = [sys.executable, "-m", "probe", "sleep"]
        ForkServer(["probe"]).start(argv, environment=os.environ, threads=1, log=log)


def test_children_end_with_the_server(start: Start, server: ForkServer) -> None:
    child = start("sleep")
    psutil.Process(child.pid).parent().kill()  # type: ignore[union-attr]
    assert child.wait(30) == -signal.SIGKILL
    until_gone(child.pid)
    assert start("exit", "0").wait(120) == 0


def test_a_killed_run_leaves_neither_server_nor_child(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": python_path(folder)}
    argv = [sys.executable, "-c", CHILD_OF_A_RUN]
    with subprocess.Popen(argv, env=environment, cwd=folder, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        server = psutil.Process(pid).ppid()
        run.kill()
    until_gone(pid)
    until_gone(server)


def test_only_listed_modules_are_forked_and_only_without_a_gpu(
    server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert server.can_start([sys.executable, "-m", "probe"], hidden)
    assert not server.can_start([sys.executable, "-m", "accelerate.commands.launch"], hidden)
    assert not server.can_start(["/usr/bin/true"], hidden)
    device = "pipelines.runtime.forked_child.GPU_DEVICES"
    monkeypatch.setattr(device, (os.devnull,))
    assert not sees_gpu(hidden)
    assert sees_gpu({}) and sees_gpu({"CUDA_VISIBLE_DEVICES": "0"})


def test_a_request_is_read_as_it_was_written() -> None:
    request = Request(
        module="probe",
        arguments=("ä",),
        imports=("probe", "torch"),
        folder="/",
        environment={"A": "b\n"},
        threads=3,
    )
    assert Request.model_validate_json(request.model_dump_json()) == request


def until_gone(pid: int) -> None:
    """Wait until a process has ended."""
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, pid
        time.sleep(0.05)
