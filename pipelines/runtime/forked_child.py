"""Children that a fork server starts, with the interface of `subprocess.Popen`. Imports no torch.

Used only where no GPU is visible: a process that has initialized a GPU library must not be forked.
"""

import array
import atexit
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from pipelines.errors import PipelineError, one_line
from pipelines.runtime import fork_server, shared_imports
from pipelines.runtime.fork_server import UNRELATED, Request, relevant_variables
from pipelines.runtime.shared_imports import ACCEPTED, Hello

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri/renderD128", "/dev/accel")
"""Device files of GPUs and other accelerators."""
WAIT_SECONDS = 0.02


class Child(Protocol):
    """What the launcher needs of a child process."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class ForkedChild:
    """A stage's process, a child of the fork server."""

    def __init__(self, status: IO[bytes], command: Sequence[str]) -> None:
        """Read the process id, which the server sends first.

        Args:
            status: the pipe from the server, which is closed when the process has ended.
            command: for messages.

        Raises:
            ForkServerError: the server has ended.
        """
        self._status = status
        self._command = command
        self._lock = threading.Lock()
        self.returncode: int | None = None
        line = status.readline()
        if not line:
            status.close()
            raise ForkServerError("the fork server has ended")
        self.pid = int(line)

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the process runs."""
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended; return its exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        status = self._read(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self._command, timeout or 0)
        return status

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _read(self, timeout: float | None) -> int | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            if self._poll_pipe() or (deadline is not None and time.monotonic() >= deadline):
                break
            time.sleep(WAIT_SECONDS)
        return self.returncode

    def _poll_pipe(self) -> bool:
        """Return whether the process has ended; another thread may wait for it too."""
        with self._lock:
            if self.returncode is not None:
                return True
            ready, _, _ = select.select([self._status], [], [], 0)
            if not ready:
                return False
            line = self._status.readline()
            # Without a line the server was killed, and this process with it.
            self.returncode = int(line) if line else -signal.SIGKILL
            self._status.close()
            return True


class ForkServerError(RuntimeError):
    """The fork server cannot start a child."""


class ForkServer:
    """The server of this process; it is started at the first child."""

    def __init__(self, modules: Sequence[str]) -> None:
        """Fork children that run one of these modules."""
        self._modules = tuple(modules)
        self._lock = threading.Lock()
        self._requests: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] = {}
        self._children = list[ForkedChild]()

    def can_start(self, argv: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Return whether a command can be forked: it runs one of the modules, without a GPU."""
        is_module = list(argv[:2]) == [sys.executable, "-m"] and argv[2] in self._modules
        return is_module and sys.platform == "linux" and not sees_gpu(environment)

    def start(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        threads: int,
        log: IO[bytes],
        imports: Sequence[str] = (),
    ) -> ForkedChild:
        """Fork a child.

        Args:
            argv: `python -m MODULE ARGUMENT …`.
            environment: of the child.
            threads: of PyTorch in the child.
            log: gets its output.
            imports: other modules that it needs, which the server imports once.

        Raises:
            ForkServerError: the server has ended.
        """
        _, _, module, *arguments = argv
        request = Request(
            module=module,
            arguments=tuple(arguments),
            imports=(module, *imports),
            folder=str(Path.cwd()),
            environment=dict(environment),
            threads=threads,
        )
        with self._lock:
            self._children = [child for child in self._children if child.poll() is None]
            status = _send(request, self._connected(environment, log), log)
            child = ForkedChild(status, argv)
            self._children.append(child)
        return child

    def close(self) -> None:
        """End the server, and with it all children."""
        with self._lock:
            self._close()

    def _connected(self, environment: Mapping[str, str], log: IO[bytes]) -> socket.socket:
        """Return the socket of a server whose libraries have read this environment.

        Raises:
            ForkServerError: children of a server with another environment are running.
        """
        relevant = relevant_variables(environment)
        is_alive = self._requests is not None and not _is_closed(self._requests)
        if self._requests is not None and is_alive and relevant == self._environment:
            return self._requests
        if is_alive and self._children:
            raise ForkServerError("it has another environment and is in use")
        if not self._environment:
            atexit.register(self.close)
        self._close()
        requests = _shared_server(Hello(variables=relevant), log) or self._start(environment, log)
        self._requests = requests
        self._environment = relevant
        return requests

    def _start(self, environment: Mapping[str, str], log: IO[bytes]) -> socket.socket:
        """Start a server of this process; return its socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", fork_server.__name__, str(number)],
                env={name: text for name, text in environment.items() if name not in UNRELATED},
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return ours

    def _close(self) -> None:
        if self._requests is not None:
            _end_server(self._requests)
            self._requests = None
        if self._process is not None:
            self._process.wait()
            self._process = None


def _shared_server(hello: Hello, log: IO[bytes]) -> socket.socket | None:
    """Return the socket of a server with shared imports; None if this run gets none.

    Raises:
        PipelineError: LORA_SHARED_IMPORTS is set, and no process listens there.
    """
    path = os.environ.get(shared_imports.VARIABLE)
    if not path:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [log.fileno()]))]
    try:
        connection.connect(path)
        connection.sendmsg([hello.model_dump_json().encode()], rights)
        if connection.recv(len(ACCEPTED)) == ACCEPTED:
            return connection
    except OSError as error:
        connection.close()
        raise PipelineError(
            f"{shared_imports.VARIABLE} is {path!r}, where no process listens "
            f"({one_line(error, with_type=False)}); start `python -m {shared_imports.__name__} "
            f"{path}`, or unset the variable"
        ) from error
    connection.close()
    return None


def _is_closed(requests: socket.socket) -> bool:
    """Return whether the server at the other end has ended; it sends nothing."""
    ready, _, _ = select.select([requests], [], [], 0)
    return bool(ready)


def _end_server(requests: socket.socket) -> None:
    """Close the connection, and wait until the server has ended, and its children with it."""
    with suppress(OSError):  # it has ended already
        requests.shutdown(socket.SHUT_WR)
        requests.recv(1)
    requests.close()


def _send(request: Request, requests: socket.socket, log: IO[bytes]) -> IO[bytes]:
    """Send a request with its open files; return the pipe that gets process id and status.

    Raises:
        ForkServerError: the server has ended.
    """
    read, write = os.pipe()
    files = array.array("i", [log.fileno(), write])
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)]
    try:
        requests.sendmsg([request.model_dump_json().encode()], rights)
    except OSError as error:
        os.close(read)
        raise ForkServerError(str(error)) from error
    finally:
        os.close(write)  # now only the server has it, so that its end is noticed
    return os.fdopen(read, "rb", buffering=0)


def sees_gpu(environment: Mapping[str, str]) -> bool:
    """Return whether a process with this environment could use a GPU."""
    if environment.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    return any(Path(device).exists() for device in GPU_DEVICES)
