"""A process that imports the libraries of stages once, and forks a child for each stage.

    python -m pipelines.runtime.fork_server SOCKET

A stage's process would import torch, transformers and datasets for several seconds of CPU time. A
forked child has them already, and is otherwise a process like any other: it fails alone.

    run ── Request, log, status pipe ──▶ server ── fork ──▶ stage
    run ◀──────── status pipe: process id, exit status ──── server

The server imports what a request names before it forks, and never runs that code itself: it has
neither started threads nor used a GPU. It ends when the run closes the socket, which the
kernel does however the run ends; the kernel then ends the stages.
"""

import array
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import BaseModel

from pipelines.runtime.child import PARENT, WORKER_INDEX, die_with_parent

REQUEST_BYTES = 1 << 20
FILES = 2
"""Open files that come with a request: the log, and the pipe for the status."""
UNRELATED = frozenset(
    {PARENT, WORKER_INDEX, "OMP_NUM_THREADS", "COLUMNS", "LINES", "PYTEST_CURRENT_TEST"}
)
"""Environment variables that no library reads when it is imported: they may differ between the
stages that a server forks."""
OF_THE_RUN = ("LORA_", "MLFLOW_", "PREFECT_")
"""Beginnings of variables that only the run reads; the same holds for them."""


class Request(BaseModel):
    """A stage to run."""

    module: str
    """Is run as `__main__`."""
    arguments: tuple[str, ...]
    imports: tuple[str, ...]
    """Modules that the child has imported."""
    folder: str
    """The working folder."""
    environment: dict[str, str]
    threads: int
    """Of PyTorch; OMP_NUM_THREADS has been read when PyTorch was imported."""


@dataclass
class Server:
    """The loop of the server: requests come in, and statuses of ended children go out."""

    requests: socket.socket
    _pipes: dict[int, int] = field(default_factory=dict)
    """Process id of a running child → the pipe that gets its status."""

    def serve(self) -> Request | None:
        """Fork a child for each request until the socket is closed.

        Returns:
            in a child its request, after the process has become that of the stage; in the server
            None, at its end.
        """
        server = os.getpid()
        ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, _ignore)
        while True:
            ready, _, _ = select.select([self.requests.fileno(), ended], [], [])
            if ended in ready:
                os.read(ended, 1 << 10)
                self._report_ended()
            if self.requests.fileno() not in ready:
                continue
            content, files = receive(self.requests)
            if not content:
                return None
            log, pipe = files
            request = Request.model_validate_json(content)
            import_all(request.imports)
            if self._fork(log, pipe) == 0:
                _prepare_process(request, log, server)
                return request

    def _fork(self, log: int, pipe: int) -> int:
        """Fork a child; return its process id in the server, and 0 in the child.

        Args:
            log: is closed in the server.
            pipe: gets the process id, and later the status.
        """
        pid = os.fork()
        if pid == 0:
            self._close_in_child(pipe)
            return 0
        os.close(log)
        self._pipes[pid] = pipe
        _write(pipe, f"{pid}\n")
        return pid

    def _close_in_child(self, pipe: int) -> None:
        """Close what only the server uses; its end must be visible to the run."""
        self.requests.close()
        for other in (pipe, *self._pipes.values()):
            os.close(other)

    def _report_ended(self) -> None:
        """Send the status of each child that has ended."""
        for pid in list(self._pipes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found == pid:
                pipe = self._pipes.pop(pid)
                _write(pipe, f"{os.waitstatus_to_exitcode(status)}\n")
                os.close(pipe)


def import_all(modules: Sequence[str]) -> None:
    """Import modules; a child reports what prevents an import when it needs the module."""
    missing = [module for module in modules if module not in sys.modules]
    for module in missing:
        with suppress(Exception):
            importlib.import_module(module)
    if missing:
        gc.freeze()  # the collector must not touch, and so copy, the pages that children share


def _ignore(number: int, frame: object) -> None:
    """Handle SIGCHLD; the wakeup file is what the loop reads."""


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Return a message and its open files; an empty one if the socket is closed."""
    numbers = array.array("i")
    content, ancillary, _, _ = connection.recvmsg(
        REQUEST_BYTES, socket.CMSG_LEN(FILES * numbers.itemsize)
    )
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data)
    return content, list(numbers)


def relevant_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a library may read when it is imported."""
    found = {}
    for name, text in environment.items():
        if name not in UNRELATED and not name.startswith(OF_THE_RUN):
            found[name] = text
    return found


def _write(pipe: int, text: str) -> None:
    with suppress(BrokenPipeError):  # nobody waits for this child any more
        os.write(pipe, text.encode())


def _prepare_process(request: Request, log: int, server: int) -> None:
    """Give the process what a started one would have: session, files, signals, environment."""
    import torch

    os.setsid()  # Ctrl-C reaches only the run
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    die_with_parent(parent=server)
    torch.set_num_threads(request.threads)


def _run_module(request: Request) -> None:
    """Run the module as `python -m` does."""
    sys.argv = [request.module, *request.arguments]
    sys.modules.pop(request.module, None)  # it is executed again, as `__main__`
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


def main(arguments: Sequence[str]) -> None:
    """Serve on the socket; in a child, run the module of its request."""
    [number] = arguments
    become_server(socket.socket(fileno=int(number)))


def become_server(requests: socket.socket) -> None:
    """Serve until the run closes the socket; in a child, run the module of its request."""
    # A batch system signals every process of a run; the server ends after its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with requests:
        request = Server(requests).serve()
    if request is None:
        os._exit(0)  # at once: the children end with it, and nothing is left to write
    _run_module(request)


if __name__ == "__main__":
    main(sys.argv[1:])
