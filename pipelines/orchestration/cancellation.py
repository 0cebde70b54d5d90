"""A flow run that is cut short leaves no process behind, and Prefect says what became of it.

    cancelled in Prefect        the worker sends SIGTERM, and SIGKILL after 30 s; Cancelled
    flow killed, as by memory   the worker sees it; Crashed
    worker killed               the kernel sends the flow SIGTERM; Crashed
    Ctrl-C, SIGTERM, scancel    the flow ends in order; Cancelled
    `lora run` killed           the next run, or `lora ui`, tells Prefect; Crashed

A run that is started again, by Retry on its page too, goes on from the last checkpoint.
"""

import fcntl
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from socket import gethostname
from typing import IO, Any
from uuid import UUID

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Cancelled, Crashed

from pipelines.console import print_status
from pipelines.runtime import launcher
from pipelines.runtime.child import die_with_parent

FLOW_RUN = "PREFECT__FLOW_RUN_ID"
"""Environment variable by which a worker names the run to the flow's process, and so to all that it starts."""
KILLED = "its process ended and could not say so; run again, it goes on from the last checkpoint"
_held: dict[UUID, IO[bytes]] = {}
"""Locked files by run, open for as long as this process lives."""
BY_HAND = (KeyboardInterrupt, TerminationSignal, SystemExit)


def by_worker() -> bool:
    """Tell whether a worker started this process."""
    return FLOW_RUN in os.environ


def end_with_worker(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Have the flow end in order when its worker ends: nobody could cancel it any more."""
    if by_worker():
        die_with_parent(signal.SIGTERM)


def kill_leftover_processes(flow: Any, flow_run: FlowRun, state: State) -> None:
    """End what the run left at work, such as ranks, which live in sessions of their own; works from another process too."""
    above = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    launcher.kill(
        [
            process
            for process in psutil.process_iter()
            if process.pid not in above and _is_of(process, str(flow_run.id))
        ]
    )


def mark_interrupted_run_cancelled(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Have Prefect call Cancelled, and not Crashed, what its user ended by Ctrl-C or SIGTERM."""
    error = sys.exc_info()[1]  # the engine calls hooks while it handles what ended the flow
    if by_worker() or not isinstance(error, BY_HAND):
        return
    message = "ended by a signal; run again, it goes on from the last checkpoint"
    print_status(message)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Cancelled(message=message), force=True)


def hold_lock(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Hold a lock on a file named after the run until this process ends; a worker watches over its runs itself.

    The kernel lets go of it however the process ends, so that the run of a file that can be locked is over.
    """
    if by_worker() or flow_run.id in _held:
        return
    path = _locks() / str(flow_run.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")  # nobody is to find it before it is locked
    lock = aside.open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    aside.rename(path)
    _held[flow_run.id] = lock


def mark_orphaned_runs_crashed(url: str) -> None:
    """Have the server at `url` call Crashed each run of this host whose process is gone and that it does not know to be over."""
    files = sorted(_locks().glob("[!.]*"))
    if not files:
        return
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        for path in files:
            with (
                suppress(BlockingIOError, ObjectNotFound, FileNotFoundError),
                path.open("r+b") as lock,
            ):  # at work, another server's, done
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                run = client.read_flow_run(UUID(path.name))
                if run.state is None or not run.state.is_final():
                    client.set_flow_run_state(run.id, Crashed(message=KILLED), force=True)
                path.unlink()


def _locks() -> Path:
    """Return where locks of this host are, beside the state of the server that a run brings along; other hosts may not see them."""
    home: Path = PREFECT_HOME.value()
    return home / "at_work" / gethostname()


def _is_of(process: psutil.Process, flow_run: str) -> bool:
    try:
        return process.environ().get(FLOW_RUN) == flow_run
    except psutil.Error:  # it has ended, or is another user's
        return False
