"""A process from which the fork servers of several runs are forked, so that they share imports.

    python -m pipelines.runtime.shared_imports SOCKET

A run starts a fork server, which imports torch, transformers and datasets for several seconds of
CPU time. If LORA_SHARED_IMPORTS names the socket of this process, the run gets a fork server that
has imported them. This pays off for many short runs on a host, such as those of the tests.

    run ── Hello, log ──▶ this process ── fork ──▶ fork server ── fork ──▶ stage

Whoever can write to the socket can run code as its owner, so only the owner can. A run that has
another environment than this process, or sees a GPU, starts a server of its own.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from pipelines.runtime.fork_server import (
    become_server,
    import_all,
    receive,
    relevant_variables,
)
from pipelines.runtime.interfaces.kinds import KINDS, LOCAL_RANKS, QUANTIZATION

VARIABLE = "LORA_SHARED_IMPORTS"
"""Names the socket; a path of at most 107 bytes, the limit of the kernel."""
ACCEPTED = b"forked"
WAITING = 64
OWNER_ONLY = 0o077
"""Mask of the permissions of the socket."""


class Hello(BaseModel):
    """The first message of a run, which comes with the log of its server."""

    variables: dict[str, str]
    """Those of its environment that a library may read when it is imported."""


def listen(path: Path) -> socket.socket | None:
    """Import everything, and fork a server for each run that connects.

    Args:
        path: of the socket, which is created.

    Returns:
        in a forked server its connection to the run; it does not return in this process.
    """
    mask = os.umask(OWNER_ONLY)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    os.umask(mask)
    for kind in KINDS.values():
        import_all((kind.module, *kind.libraries))
    import_all((LOCAL_RANKS, *QUANTIZATION))
    own = relevant_variables(_given_environment())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
    listener.listen(WAITING)
    while True:
        connection, _ = listener.accept()
        content, files = receive(connection)
        is_served = bool(content) and Hello.model_validate_json(content).variables == own
        if is_served and os.fork() == 0:
            listener.close()
            _take_over_log(files[0])
            connection.send(ACCEPTED)
            return connection
        connection.close()
        for number in files:
            os.close(number)


def _given_environment() -> dict[str, str]:
    """Return the environment that this process was started with; libraries add variables to it."""
    pairs = Path("/proc/self/environ").read_bytes().split(b"\0")
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)


def _take_over_log(log: int) -> None:
    """Become a process as the run would have started it."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target in (1, 2):
        os.dup2(log, target)
    os.close(log)


def main(arguments: Sequence[str]) -> None:
    """Listen on the socket; in a forked server, serve the run that asked for it."""
    [path] = arguments
    with suppress(KeyboardInterrupt):
        connection = listen(Path(path))
        if connection is not None:
            become_server(connection)


if __name__ == "__main__":
    main(sys.argv[1:])
