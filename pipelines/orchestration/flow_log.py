"""Progress of a training in Prefect: lines in the log of its task, and a bar on the page.

A server that is away neither delays nor fails the training: lines wait in Prefect's own queue, and
a thread draws the bar.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from pipelines.console import Row, StepProgress, Throttled, Watch, print_status, progress_line
from pipelines.errors import one_line
from pipelines.orchestration.cancellation import started_by_worker

SECONDS_BETWEEN_BARS = 10
SECONDS_TO_FINISH = 3
"""How long the end of a training waits for the last update of the bar."""


def log_for_pages_only() -> None:
    """Have runs log to the server and not to the terminal, which displays them in its own way."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def log_and_print(text: str) -> None:
    """Log a line to the task and print it.

    A worker prints the log itself, so there it is only logged.
    """
    get_run_logger().info(text)
    if not started_by_worker():
        print_status(text)


@contextmanager
def report_training(label: str) -> Iterator[Watch]:
    """Yield a callback for new rows of metrics; it updates the bar, and at times the log."""
    bar = _ProgressBar(label)
    logger = get_run_logger()
    log_line = Throttled(lambda row: logger.info(progress_line(label, row)))

    def watch(row: Row) -> None:
        bar.row = row
        log_line(row)

    bar.start()
    try:
        yield watch
    finally:
        bar.finish()


class _ProgressBar:
    """Draws the latest row every few seconds, in a thread: a hanging server must not block."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.row: Row | None = None
        self._artifact: UUID | None = None
        self._drawn: Row | None = None
        self._failed = False
        self._over = threading.Event()
        context = copy_context()  # identifies the run
        self._thread = threading.Thread(target=context.run, args=(self._keep_drawing,), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Draw the last row, if the server answers in time."""
        self._over.set()
        self._thread.join(SECONDS_TO_FINISH)

    def _keep_drawing(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_BARS):
            self._draw()
        self._draw()

    def _draw(self) -> None:
        """Draw the latest row; print only the first failure."""
        row = self.row
        if row is None or row is self._drawn:
            return
        try:
            percent = StepProgress.of(row).percent
            self._write(percent, progress_line(self.label, row))
        except Exception as error:  # noqa: BLE001 - the training continues, whatever is wrong with a page
            if not self._failed:
                text = f"{self.label}: Prefect's page does not show the progress"
                print_status(f"{text} ({one_line(error)})", mark="…")
            self._failed = True
            return
        self._drawn = row

    def _write(self, percent: float, text: str) -> None:
        if self._artifact is None:
            self._artifact = _id(create_progress_artifact(percent, description=text))
        else:
            update_progress_artifact(self._artifact, percent, description=text)


def _id(value: Any) -> UUID:
    """Return an artifact's id; Prefect types its functions for both sync and async calls."""
    assert isinstance(value, UUID), value
    return value
