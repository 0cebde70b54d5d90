"""The Prefect server that a run brings along where none is named: a child that outlives what ends the run, and not the run.

    python -m pipelines.orchestration.local_server SOCKET

Prefect would start one itself. But Ctrl-C, a batch system and systemd signal every process of a run at once, and a server
that ended by that could not be told how the run ended; nor would it end with a run that is killed. This one hears no signal,
and ends when the pipe from the run closes, which the kernel does however the run ends.
"""

import atexit
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from prefect.client.orchestration import get_client
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, get_current_settings

from pipelines.errors import PipelineError, StageError, UnreachableError

HOST = "127.0.0.1"
SECONDS_TO_START = 90
"""A new home has its tables made first."""
SECONDS_TO_END = 10
SECONDS_TO_ANSWER = 5
"""Of them, for what is still being asked."""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_servers: "list[subprocess.Popen[bytes]]" = []
"""Held for as long as this process lives, for their pipes."""


@contextmanager
def serving() -> Iterator[str]:
    """Yield the address of a server: the one that the user has named, or else a new one, which ends with this process.

    Raises:
        PipelineError: it does not start.
        StageError: it does not answer, now or while the block is at work.
    """
    if PREFECT_API_URL.value() is None:
        os.environ[PREFECT_API_URL.name] = _start()
        refresh_global_settings_context()
    url = str(PREFECT_API_URL.value())
    try:
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
        if error is not None:
            raise error
        yield url
    except httpx.HTTPError as error:
        raise StageError(
            f"the Prefect server at {httpx.URL(url).netloc.decode()} does not serve this run ({error}); see that it is well, or unset "
            "PREFECT_API_URL for one of the run's own",
            kind=UnreachableError.__name__,
        ) from error


def is_own() -> bool:
    """Tell whether the server is this process's own, which no other run asks."""
    return bool(_servers)


def _start() -> str:
    """Start a server and wait until it answers; return its address. Two at once would both make the tables of a new home."""
    home: Path = PREFECT_HOME.value()
    log = home / "server.log"
    with (
        (home / "starting").open("wb") as turn,
        socket.create_server((HOST, 0)) as listener,
        log.open("ab") as stream,
    ):
        fcntl.flock(turn, fcntl.LOCK_EX)
        url = f"http://{HOST}:{listener.getsockname()[1]}/api"
        server = subprocess.Popen(
            [sys.executable, "-m", "pipelines.orchestration.local_server", str(listener.fileno())],
            env={
                **os.environ,
                **get_current_settings().to_environment_variables(exclude_unset=True),
                "PREFECT_SERVER_UI_ENABLED": "0",
            },
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            preexec_fn=_ignore_signals,  # system calls, no lock is taken
        )
        _servers.append(server)
        bypass_proxy(HOST)
        atexit.register(_end, server)  # after all that Prefect has to say at the end
        listener.close()  # the server's alone, so that whoever asks one that has ended is refused
        try:
            httpx.get(
                f"{url}/health", timeout=SECONDS_TO_START
            ).raise_for_status()  # waits in the socket's queue until it is up
        except httpx.HTTPError as error:
            raise PipelineError(
                f"Prefect's own server does not start ({error}); {log} says why"
            ) from error
    return url


def bypass_proxy(host: str) -> None:
    """Have no proxy stand between this process and a host, whatever the environment says of others."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))


def _ignore_signals() -> None:
    for one in ENDING:
        signal.signal(one, signal.SIG_IGN)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """Let the server write down what it holds, and end."""
    assert server.stdin is not None
    server.stdin.close()
    try:
        server.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        server.kill()


class _Server(uvicorn.Server):
    """Ends when the pipe from its run closes, and by nothing else."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Leave it to the run to end."""

    def end_with_run(self) -> None:
        """Wait for the pipe to close, and end in order."""
        os.read(sys.stdin.fileno(), 1)
        self.should_exit = True


def serve(listener: socket.socket) -> None:
    """Serve Prefect's interface without its pages until the run is gone."""
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    server = _Server(
        uvicorn.Config(
            app, log_level="error", lifespan="on", timeout_graceful_shutdown=SECONDS_TO_ANSWER
        )
    )
    threading.Thread(target=server.end_with_run, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
