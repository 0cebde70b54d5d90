"""What a training tells Prefect: lines in the log of its task, and a bar on the page of the flow run.

A server that is away costs the training neither time nor a failure: lines wait in Prefect's own queue, and the bar is
drawn by a thread.
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

from pipelines.console import Row, Throttled, Watch, print_status, progress_line
from pipelines.orchestration.cancellation import by_worker

SECONDS_BETWEEN_BARS = 10
SECONDS_TO_FINISH = 3
"""How long the end of a training waits for the last bar to be drawn."""


def log_for_pages_only() -> None:
    """Have runs log to the server and not to the terminal, which shows them in its own way."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def log_and_print(text: str) -> None:
    """Say a line and put it into the log of the task; a worker shows that log, so there it is said once."""
    get_run_logger().info(text)
    if not by_worker():
        print_status(text)


@contextmanager
def reported(label: str) -> Iterator[Watch]:
    """Yield what takes each new row of metrics and passes it on: to the log now and then, and to the bar."""
    bar, logger = _Bar(label), get_run_logger()
    lines = Throttled(lambda row: logger.info(progress_line(label, row)))

    def watch(row: Row) -> None:
        bar.row = row
        lines(row)

    bar.start()
    try:
        yield watch
    finally:
        bar.finish()


class _Bar:
    """Draws the newest row every few seconds, in a thread: a server that does not answer must hold nobody up."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.row: Row | None = None
        self._artifact: UUID | None = None
        self._drawn: Row | None = None
        self._failed = False
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._draw_on,), daemon=True
        )  # the context names the run

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Have the last row drawn, if the server answers in time."""
        self._over.set()
        self._thread.join(SECONDS_TO_FINISH)

    def _draw_on(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_BARS):
            self._draw()
        self._draw()

    def _draw(self) -> None:
        """Draw the newest row; what fails is said once."""
        row = self.row
        if row is None or row is self._drawn:
            return
        try:
            self._write(100 * row["step"] / row["steps"], progress_line(self.label, row))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a page, the training goes on
            if not self._failed:
                print_status(
                    f"{self.label}: Prefect's page does not show how far it is ({type(error).__name__}: {error})",
                    mark="…",
                )
            self._failed = True
            return
        self._drawn = row

    def _write(self, percent: float, text: str) -> None:
        if self._artifact is None:
            self._artifact = _id(create_progress_artifact(percent, description=text))
        else:
            update_progress_artifact(self._artifact, percent, description=text)


def _id(value: Any) -> UUID:
    """Return an artifact's id; Prefect's functions are typed for both of their ways to be called."""
    assert isinstance(value, UUID), value
    return value
