"""Terminate processes and everything that they started. Imports no torch."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from pipelines.runtime import fork_server
from pipelines.runtime.forked_child import Child

SESSION = "session"
"""File in a stage's folder with the session of its process; the command of a forked process is that
of its server."""
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
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        is_named = str(folder) in arguments and process.pid != os.getpid()
        if is_named or (fork_server.__name__ in arguments and _is_in_session(process.pid, session)):
            leftovers.append(process)
    kill(leftovers)


def _session_of(folder: Path) -> int | None:
    """Return the session of the stage's last process; None if there was none."""
    with suppress(OSError, ValueError):
        return int((folder / SESSION).read_text())
    return None


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
