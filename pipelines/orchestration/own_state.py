"""A run follows its state on the server, so that Cancel and Suspend reach it without its worker.

    Cancelling      the worker ends the run; if there is none, the run ends itself; Cancelled
    Suspended       the run ends after the next checkpoint of its training, or at once if nothing
                    trains; Resume starts it again, and the training resumes there
    started again   in another process, such as by Resume before that checkpoint: this one ends

A thread reads the state every few seconds and interrupts the main thread by a signal. A server that
does not answer changes nothing: the run continues.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound, Pause, TerminationSignal

from pipelines.console import print_status

POLL_SECONDS = 5.0
POLLS_OF_WORKER = 8
"""How often Cancelling is seen before a run ends itself although its worker exists."""
SUSPENDED = "Suspended"
INTERRUPT = signal.SIGUSR1
WAITING = (StateType.SCHEDULED, StateType.PENDING)
_trainings: set[Path] = set()
"""Folders of the trainings in progress in this process."""


class CancelledByServerError(TerminationSignal):
    """The state of the run on the server is Cancelling, and no worker ends it."""

    def __init__(self) -> None:
        super().__init__(signal.SIGTERM)


class SuspendedByServerError(Pause):
    """The state of the run on the server is Suspended, or another process has it."""


@contextmanager
def training_in(folder: Path) -> Iterator[None]:
    """Let a suspension during the block wait for the next checkpoint in a stage's folder."""
    _trainings.add(folder)
    try:
        yield
    finally:
        _trainings.discard(folder)


@contextmanager
def follow_state(run: UUID | None) -> Iterator[None]:
    """Interrupt the block, which is in the main thread, if the state of the run requires it.

    Args:
        run: id of the flow run; None follows nothing.

    Raises:
        CancelledByServerError: the run is to be cancelled.
        SuspendedByServerError: the run is suspended.
    """
    if run is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    follower = _Follower(run)
    previous = signal.signal(INTERRUPT, follower.interrupt)
    thread = threading.Thread(target=follower.run, name="own state", daemon=True)
    thread.start()
    try:
        yield
    finally:
        follower.stop()
        thread.join()
        signal.signal(INTERRUPT, previous)


class _Follower:
    """Reads the state of one run until it requires an interruption."""

    def __init__(self, run: UUID) -> None:
        self._run = run
        self._worker = os.getppid()
        self._is_over = threading.Event()
        self._starts: int | None = None
        self._cancelling_seen = 0
        self._known: set[Path] | None = None
        """Checkpoints when the suspension was seen; None before."""
        self._reason: BaseException | None = None

    def stop(self) -> None:
        """End the thread."""
        self._is_over.set()

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Raise the reason, as the handler of the signal."""
        if self._reason is not None and not self._is_over.is_set():
            raise self._reason

    def run(self) -> None:
        """Read the state again and again; interrupt the main thread once."""
        with get_client(sync_client=True) as client:
            while not self._is_over.wait(POLL_SECONDS):
                with suppress(httpx.HTTPError):
                    self._reason = self._required(client)
                if self._reason is not None:
                    os.kill(os.getpid(), INTERRUPT)
                    return

    def _required(self, client: SyncPrefectClient) -> BaseException | None:
        """Return what ends the run now; None to continue."""
        try:
            flow_run = client.read_flow_run(self._run)
        except ObjectNotFound:
            return CancelledByServerError()
        if self._starts is None:
            self._starts = flow_run.run_count
        if self._is_taken_over(flow_run):
            return SuspendedByServerError()
        state = flow_run.state
        if state is None:
            return None
        if state.type == StateType.CANCELLING:
            self._cancelling_seen += 1
            has_worker = os.getppid() == self._worker
            waits = has_worker and self._cancelling_seen < POLLS_OF_WORKER
            return None if waits else CancelledByServerError()
        if state.name == SUSPENDED:
            return self._suspension()
        return None

    def _is_taken_over(self, flow_run: FlowRun) -> bool:
        """Return whether another process runs it, or is about to."""
        is_waiting = flow_run.state is not None and flow_run.state.type in WAITING
        return is_waiting or flow_run.run_count != self._starts

    def _suspension(self) -> BaseException | None:
        """Return the end of the run once a checkpoint was written since the suspension."""
        current = _checkpoints()
        if self._known is None:
            self._known = current
            if _trainings:
                print_status("suspended: the run ends after the next checkpoint")
        is_saved = bool(current - self._known)
        return SuspendedByServerError() if is_saved or not _trainings else None


def _checkpoints() -> set[Path]:
    """Return the complete checkpoints of the trainings in progress."""
    found: set[Path] = set()
    for folder in tuple(_trainings):
        found |= set(folder.glob("checkpoints/step-*[0-9]"))
    return found
