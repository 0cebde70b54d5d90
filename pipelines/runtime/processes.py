"""Terminate processes and everything that they started. Imports no torch."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

GRACE_SECONDS = 15
"""Time between SIGTERM and SIGKILL for a child and its ranks. Prefect's worker kills the run after
30 s."""


def end(child: "subprocess.Popen[bytes]") -> None:
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
    leftovers = []
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if str(folder) in arguments and process.pid != os.getpid():
            leftovers.append(process)
    kill(leftovers)


def kill(processes: list[psutil.Process]) -> None:
    """Send SIGKILL and wait until the processes are gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)
