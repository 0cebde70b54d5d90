"""A flow run that is cut short leaves no process behind, and Prefect says what became of it.

    cancelled in Prefect        the worker sends SIGTERM, and SIGKILL after 30 s; Cancelled
    flow killed, as by memory   the worker sees it; Crashed
    worker killed               the kernel sends the flow SIGTERM; Crashed
    Ctrl-C on `lora run`        the flow ends in order; Cancelled

A run that is started again, by Retry on its page too, goes on from the last checkpoint.
"""

import os
import signal
import subprocess
import sys
from typing import Any

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled

from pipelines import launch
from pipelines.child import die_with_parent
from pipelines.progress import say

FLOW_RUN = "PREFECT__FLOW_RUN_ID"
"""Environment variable by which a worker names the run to the flow's process, and so to all that it starts."""
GUARD = 'read _; kill "$1"'
"""Ends the server when the pipe to it closes: Prefect starts its server in a way that leaves no other hold on it."""
_guards: "list[subprocess.Popen[bytes]]" = []
"""Held for as long as this process lives, for their pipes."""
BY_HAND = (KeyboardInterrupt, TerminationSignal, SystemExit)


def by_worker() -> bool:
    """Tell whether a worker started this process."""
    return FLOW_RUN in os.environ


def start_server() -> None:
    """Start the server that Prefect brings along, where none is named, out of reach of Ctrl-C.

    A terminal sends Ctrl-C to all that was started from it. A server that ended by it could not be told how the run ended,
    and the run would ask it again for a minute. Nor may it outlive a run that is killed.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit the mask, whatever handlers they set
    try:
        with get_client(sync_client=True):
            pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _guards.extend(_guard(child) for child in psutil.Process().children() if _is_server(child))


def _guard(server: psutil.Process) -> "subprocess.Popen[bytes]":
    """Start what ends the server when this process is gone, and with it the other end of the guard's pipe."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        ["sh", "-c", GUARD, "guard", str(server.pid)], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
    )


def _is_server(process: psutil.Process) -> bool:
    try:
        return "uvicorn" in process.cmdline()
    except psutil.Error:  # it has ended
        return False


def end_with_worker(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Have the flow end in order when its worker ends: nobody could cancel it any more."""
    if by_worker():
        die_with_parent(signal.SIGTERM)


def end_what_is_left(flow: Any, flow_run: FlowRun, state: State) -> None:
    """End what the run left at work, such as ranks, which live in sessions of their own; works from another process too."""
    above = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    launch.kill([process for process in psutil.process_iter() if process.pid not in above and _is_of(process, str(flow_run.id))])


def call_interruption_cancelled(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Have Prefect call Cancelled, and not Crashed, what its user ended by Ctrl-C or SIGTERM."""
    error = sys.exc_info()[1]  # the engine calls hooks while it handles what ended the flow
    if by_worker() or not isinstance(error, BY_HAND):
        return
    message = "ended by a signal; run again, it goes on from the last checkpoint"
    say(message)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Cancelled(message=message), force=True)


def _is_of(process: psutil.Process, flow_run: str) -> bool:
    try:
        return process.environ().get(FLOW_RUN) == flow_run
    except psutil.Error:  # it has ended, or is another user's
        return False
