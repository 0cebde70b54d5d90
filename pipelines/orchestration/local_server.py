"""The local Prefect server of a run, used unless PREFECT_API_URL names one.

It ends together with the run.

    python -m pipelines.orchestration.local_server SOCKET

Prefect would start a server itself. But Ctrl-C, a batch system and systemd send a signal to every
process of a run at once; Prefect's server would end before the run could report how it ended, and
it would survive a run that is killed. This one ignores signals. It ends when the pipe from the run
closes, which the kernel does however the run ends.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import uvicorn
from filelock import FileLock
from prefect.client.orchestration import get_client
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, get_current_settings

from pipelines.errors import PipelineError, StageError, UnreachableError, one_line

HOST = "127.0.0.1"
SECONDS_TO_START = 90
"""A new PREFECT_HOME needs its database tables first."""
SECONDS_TO_END = 10
SECONDS_TO_ANSWER = 5
"""Part of SECONDS_TO_END, for requests in progress."""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_servers: "list[subprocess.Popen[bytes]]" = []
"""Kept for the lifetime of this process, because of their pipes."""


@contextmanager
def prefect_server() -> Iterator[str]:
    """Yield the address of a server: the one that the user has configured, or else a local one.

    Raises:
        PipelineError: the local server does not start.
        StageError: the server does not answer, now or during the block.
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
        reason = one_line(error, with_type=False)
        raise StageError(
            f"the Prefect server at {httpx.URL(url).netloc.decode()} does not answer this run "
            f"({reason}); check the server, or unset PREFECT_API_URL to use a local one",
            kind=UnreachableError.__name__,
        ) from error


def is_server_local() -> bool:
    """Return whether this process has started its own server, which no other run uses."""
    return bool(_servers)


def _start() -> str:
    """Start a server, wait until it answers, and return its address.

    A lock prevents two servers from creating the tables of a new PREFECT_HOME at the same time.
    """
    home: Path = PREFECT_HOME.value()
    log = home / "server.log"
    with (
        FileLock(home / "starting"),
        socket.create_server((HOST, 0)) as listener,
        log.open("ab") as stream,
    ):
        url = f"http://{HOST}:{listener.getsockname()[1]}/api"
        server = _launch(listener, stream)
        _servers.append(server)
        bypass_proxy(HOST)
        atexit.register(_end, server)  # after Prefect's last request
        # Only the server listens now, so that requests are refused once it has ended.
        listener.close()
        try:
            # The request waits in the socket's queue until the server is up.
            httpx.get(f"{url}/health", timeout=SECONDS_TO_START).raise_for_status()
        except httpx.HTTPError as error:
            raise PipelineError(
                f"the local Prefect server does not start ({error}); see {log} for the reason"
            ) from error
    return url


def _launch(listener: socket.socket, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    socket_number = str(listener.fileno())
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.orchestration.local_server", socket_number],
        env={**os.environ, **settings, "PREFECT_SERVER_UI_ENABLED": "0"},
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        pass_fds=[listener.fileno()],
        start_new_session=True,
        preexec_fn=_ignore_signals,  # system calls only, takes no lock
    )


def bypass_proxy(host: str) -> None:
    """Let this process reach a host directly, whichever proxy the environment configures."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [os.environ.get(name), host]
        os.environ[name] = ",".join(filter(None, hosts))


def _ignore_signals() -> None:
    for ending in ENDING:
        signal.signal(ending, signal.SIG_IGN)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """Let the server write its state and end."""
    assert server.stdin is not None
    server.stdin.close()
    try:
        server.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        server.kill()


class _Server(uvicorn.Server):
    """Ends when the pipe from its run closes, and only then."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Ignore the signal; the run ends the server."""

    def end_with_run(self) -> None:
        """Wait for the pipe to close, then shut down in order."""
        os.read(sys.stdin.fileno(), 1)
        self.should_exit = True


def serve(listener: socket.socket) -> None:
    """Serve Prefect's API, without its pages, until the run has ended."""
    from prefect.server.api.server import create_app

    config = uvicorn.Config(
        create_app(ephemeral=True, final=True),
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=SECONDS_TO_ANSWER,
    )
    server = _Server(config)
    threading.Thread(target=server.end_with_run, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
