"""The command line, as a user runs it."""

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import httpx
from prefect_tables import add_tables

from pipelines.orchestration import local_server
from pipelines.runtime import launcher, shared_imports
from pipelines.runtime.child import die_with_parent

LORA = [str(Path(sys.executable).parent / "lora")]


def lora(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a folder, as a user does."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        "LORA_RUNS": str(folder / "runs"),
        **environment,
    }
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI"):
        if name not in environment:
            env.pop(name, None)
    env[shared_imports.VARIABLE] = SHARED.socket_for(env)
    if arguments[0] == "run" and not {"PREFECT_API_URL", "PREFECT_HOME"} & env.keys():
        add_tables(Path(env["LORA_RUNS"]) / "prefect")
    return subprocess.run(
        [*LORA, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


class SharedImports:
    """A process that the runs of all tests of this process share, from the first run on.

    A run whose environment differs from that of the first one starts its own fork server.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._socket: Path | None = None

    def socket_for(self, environment: Mapping[str, str]) -> str:
        """Return the socket; the first call starts the process for this environment."""
        if self._socket is None:
            folder = self._open.enter_context(tempfile.TemporaryDirectory())
            self._socket = Path(folder) / "socket"
            of_stages = environment_of_stages(environment)
            self._open.enter_context(shared_imports_at(self._socket, of_stages))
            atexit.register(self._open.close)
        return str(self._socket)


SHARED = SharedImports()


def environment_of_stages(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that a run with the given one gives its stages."""
    with patch.dict(os.environ, environment, clear=True):
        return launcher._environment(1)


@contextmanager
def shared_imports_at(path: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Run a process whose imports runs with the same environment share.

    Args:
        path: of its socket.
        environment: of these runs.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", shared_imports.__name__, str(path)],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )
    try:
        while not _accepts(path):
            if process.poll() is not None:
                raise RuntimeError(f"{shared_imports.__name__} ended with {process.returncode}")
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        return connection.connect_ex(str(path)) == 0


@contextmanager
def shared_prefect_server(home: Path) -> Iterator[str]:
    """Run one Prefect server for several runs, which would each start their own.

    Yields:
        The value of PREFECT_API_URL.
    """
    add_tables(home)
    with socket.create_server((local_server.HOST, 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-m", local_server.__name__, str(listener.fileno())],
            env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_UI_ENABLED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
        url = f"http://{local_server.HOST}:{listener.getsockname()[1]}/api"
    with process:  # closes the pipe, which ends the server
        answer = httpx.get(f"{url}/health", timeout=local_server.SECONDS_TO_START)
        answer.raise_for_status()
        yield url
