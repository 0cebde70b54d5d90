"""A flow run that is interrupted leaves no process behind, and Prefect shows how it ended.

    cancelled in Prefect        the worker sends SIGTERM, and SIGKILL after 30 s; Cancelled
    flow killed (e.g. memory)   the worker detects it; Crashed
    worker killed               the run continues, and follows its state itself; see own_state.py
    Ctrl-C, SIGTERM, scancel    the flow ends in order; Cancelled
    `lora run` killed           the next run, or `lora ui`, reports it to Prefect; Crashed

A run that is started again, also by Retry on its page, resumes from the last checkpoint.
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from socket import gethostname
from types import FrameType
from typing import Any
from uuid import UUID

import psutil
from filelock import BaseFileLock, FileLock, Timeout
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Cancelled, Crashed

from pipelines.console import print_status
from pipelines.orchestration.own_state import CancelledByServerError
from pipelines.runtime import processes
from pipelines.runtime.child import die_with_parent

FLOW_RUN = "PREFECT__FLOW_RUN_ID"
"""Environment variable that a worker sets for the flow's process; all processes of the run inherit
it."""
CRASHED_MESSAGE = (
    "its process ended without reporting how; run again, it resumes from the last checkpoint"
)
CANCELLED_MESSAGE = "ended by a signal; run again, it resumes from the last checkpoint"
WORKER_ENDED = signal.SIGUSR2
"""What the kernel sends to a run whose worker ends."""
_locks: dict[UUID, BaseFileLock] = {}
"""Locks by run, held for the lifetime of this process."""
USER_INTERRUPTS = (KeyboardInterrupt, TerminationSignal, SystemExit)


def started_by_worker() -> bool:
    """Return whether a worker started this process."""
    return FLOW_RUN in os.environ


def outlive_worker(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Let the run continue when its worker ends, which reads its output until then."""
    if started_by_worker():
        signal.signal(WORKER_ENDED, _drop_output)
        die_with_parent(WORKER_ENDED)


def _drop_output(number: int, frame: FrameType | None) -> None:
    """Write the output nowhere: nobody reads the pipe any longer, so that writing would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


def kill_leftover_processes(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Kill what the run left running, such as ranks, which run in separate sessions.

    This also works when it is called from a process outside the run.
    """
    ancestors = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    leftovers = []
    for process in processes.running_processes():
        if process.pid not in ancestors and _belongs_to(process, str(flow_run.id)):
            leftovers.append(process)
    processes.kill(leftovers)


def interrupted_by_user() -> bool:
    """Return, in a hook of a flow, whether a user ended it.

    With Ctrl-C or a signal to `lora run`, or with Cancel when its worker was gone.
    """
    error = sys.exc_info()[1]  # the engine calls hooks while it handles what ended the flow
    if isinstance(error, CancelledByServerError):
        return True
    return isinstance(error, USER_INTERRUPTS) and not started_by_worker()


def mark_interrupted_run_cancelled(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Mark a run that its user ended as Cancelled instead of Crashed."""
    if not interrupted_by_user():
        return
    print_status(CANCELLED_MESSAGE)
    with get_client(sync_client=True) as client:
        state = Cancelled(message=CANCELLED_MESSAGE)
        client.set_flow_run_state(flow_run.id, state, force=True)


def hold_lock(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Lock a file named after the run until this process ends; a worker monitors its runs itself.

    The kernel releases the lock however the process ends. If another process can lock the file, the
    run is over.
    """
    if started_by_worker() or flow_run.id in _locks:
        return
    path = _lock_folder() / str(flow_run.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}")  # others must not find it before it is locked
    lock = FileLock(hidden)
    lock.acquire()
    hidden.rename(path)
    _locks[flow_run.id] = lock


def mark_orphaned_runs_crashed(url: str) -> None:
    """Mark this host's unfinished runs on the server at `url` Crashed if their process is gone."""
    files = sorted(_lock_folder().glob("[!.]*"))
    if not files:
        return
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        for path in files:
            # The run is in progress, belongs to another server, or was handled by another process.
            with suppress(Timeout, ObjectNotFound):
                _mark_crashed_if_orphaned(client, path)


def _mark_crashed_if_orphaned(client: SyncPrefectClient, path: Path) -> None:
    with FileLock(path, blocking=False):
        run = client.read_flow_run(UUID(path.name))
        if run.state is None or not run.state.is_final():
            client.set_flow_run_state(run.id, Crashed(message=CRASHED_MESSAGE), force=True)
        path.unlink(missing_ok=True)


def _lock_folder() -> Path:
    """Return the folder of this host's locks, next to the state of the local server.

    Other hosts may not have access to it.
    """
    home: Path = PREFECT_HOME.value()
    return home / "at_work" / gethostname()


def _belongs_to(process: psutil.Process, flow_run: str) -> bool:
    try:
        return process.environ().get(FLOW_RUN) == flow_run
    except psutil.Error:  # it has ended, or belongs to another user
        return False
