"""Terminate processes and everything that they started. Imports no torch."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from pipelines.runtime import fork_server, shared_imports
from pipelines.runtime.forked_child import Child

SESSION = "session"
"""File in a stage's folder with the session of its process, which is the process's id, and when it
started; the command of a forked process is that of its server."""
START_FIELD = 19
"""Of the start in /proc/PID/stat, counted after the command."""
GRACE_SECONDS = 15
"""Time between SIGTERM and SIGKILL for a child and its ranks. Prefect's worker kills the run after
30 s."""


def end(child: Child) -> None:
    """Terminate a child, then kill all its descendants. Ranks run in separate sessions."""
    with suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(child.pid).children(recursive=True)
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)
        kill(descendants)
    if child.poll() is None:
        child.kill()
        child.wait()


def kill_leftovers(folder: Path) -> None:
    """Kill what an earlier run left running here, such as ranks whose launcher was killed."""
    session = _session_of(folder)
    leftovers = []
    for process in running_processes():
        with suppress(psutil.Error):  # it has ended, or belongs to another user
            arguments = process.cmdline()
            is_named = str(folder) in arguments and process.pid != os.getpid()
            is_forked = fork_server.__name__ in arguments or shared_imports.__name__ in arguments
            if is_named or (is_forked and _is_in_session(process.pid, session)):
                leftovers.append(process)
    kill(leftovers)


def running_processes() -> Iterator[psutil.Process]:
    """Yield every process of this host.

    `psutil.process_iter` would yield objects of its earlier calls, which refuse to kill a process
    if the kernel has given it the id of one that has ended since.
    """
    for pid in psutil.pids():
        with suppress(psutil.NoSuchProcess):
            yield psutil.Process(pid)


def record_session(folder: Path, pid: int) -> None:
    """Note the process of a stage, which leads a session, for `kill_leftovers`."""
    with suppress(OSError):  # it has ended, or this is no Linux, where nothing is forked
        (folder / SESSION).write_text(f"{pid} {_start_ticks(pid)}")


def _session_of(folder: Path) -> int | None:
    """Return the session of the stage's last process; None if there is none any more.

    The kernel gives the id to another process once the session has no member, and never before.
    """
    with suppress(OSError, ValueError):
        pid, started = (folder / SESSION).read_text().split()
        is_another = Path(f"/proc/{pid}").exists() and _start_ticks(int(pid)) != started
        return None if is_another else int(pid)
    return None


def _start_ticks(pid: int) -> str:
    """Return when a process started, in ticks since Linux did; clock changes have no effect."""
    after_command = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    return after_command.split()[START_FIELD]


def _is_in_session(pid: int, session: int | None) -> bool:
    with suppress(ProcessLookupError):
        return session is not None and os.getsid(pid) == session
    return False


def kill(processes: list[psutil.Process]) -> None:
    """Send SIGKILL and wait until the processes are gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)
