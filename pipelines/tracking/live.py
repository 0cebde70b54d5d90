"""A training in MLflow while it runs: a thread periodically sends rows and system metrics.

Training never waits for MLflow. The thread imports it, rows are passed through a queue, and the
user is warned once about a server that is away or refuses. At the end, the thread gets a few
seconds to send the remaining rows; the comparison's own run logs the complete curve anyway.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from pipelines.console import Row, Watch
from pipelines.runtime.interfaces.inputs import TrainInputs
from pipelines.runtime.interfaces.results import TrainResult
from pipelines.runtime.stage import Stage

if TYPE_CHECKING:
    from pipelines.tracking.recorder import Recorder

SEND_SECONDS = 3.0
"""Time between two requests."""
MAX_SEND_SECONDS = 30.0
"""Longest time between two requests while the server does not answer."""
END_SECONDS = 4.0
"""How long the end of a training waits for rows that were not sent."""
SAMPLING_VARIABLE = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
"""MLflow's own environment variable for the sampling interval of system metrics, in seconds."""
SAMPLING_SECONDS = 10.0
"""The default of that variable."""


@contextmanager
def live_run(
    stage: Stage[TrainInputs, TrainResult], experiment: str, print_status: Callable[[str], None]
) -> Iterator[Watch]:
    """Yield a function that takes each new row of a training's metrics, until the block ends.

    The run is looked up by the stage's key, so that a resumed training continues its run. It ends
    as FINISHED; as FAILED if the block raises; as KILLED if the block is interrupted.

    Args:
        stage: the stage of the training.
        experiment: name of the comparison's MLflow experiment.
        print_status: prints one line.
    """
    sender = _Sender(stage, experiment, print_status)
    thread = threading.Thread(target=sender.run, name="live metrics", daemon=True)
    thread.start()
    status = "KILLED"
    try:
        yield sender.rows.put
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        sender.end(status)
        thread.join(END_SECONDS)


def sampling_seconds() -> float:
    """Return the sampling interval of system metrics: at least one second.

    A variable that is not a number gives the default.
    """
    try:
        return max(1.0, float(os.environ.get(SAMPLING_VARIABLE) or SAMPLING_SECONDS))
    except ValueError:
        return SAMPLING_SECONDS


class _Sender:
    """Sends rows in its own thread until the training ends."""

    def __init__(
        self,
        stage: Stage[TrainInputs, TrainResult],
        experiment: str,
        print_status: Callable[[str], None],
    ) -> None:
        self.rows: SimpleQueue[Row] = SimpleQueue()
        self._stage = stage
        self._experiment = experiment
        self._started = _milliseconds()
        self._print_status = print_status
        self._status = ""
        self._ended = threading.Event()
        self._has_warned = False

    def end(self, status: str) -> None:
        """Send the remaining rows, end the run with a status and stop the thread."""
        self._status = status
        self._ended.set()

    def run(self) -> None:
        from pipelines.tracking.recorder import Recorder  # imports MLflow, which takes seconds

        recorder = Recorder(self._stage, self._experiment, self._started)
        interval = sampling_seconds()
        send_at = 0.0
        sample_at = time.monotonic() + interval
        pause = SEND_SECONDS
        while True:
            ended = self._ended.is_set()  # read once: rows put before the end are all sent below
            now = time.monotonic()
            recorder.take(self._waiting_rows())
            if ended or now >= sample_at:
                recorder.sample(_milliseconds())
                sample_at = now + interval
            if ended:
                recorder.send(self._status)
                return
            if now >= send_at:
                is_sent = self._send(recorder)
                pause = SEND_SECONDS if is_sent else min(2 * pause, MAX_SEND_SECONDS)
                send_at = time.monotonic() + pause
            self._ended.wait(min(SEND_SECONDS, interval))

    def _send(self, recorder: "Recorder") -> bool:
        """Send the waiting rows and return whether that succeeded; warn about the first failure."""
        problem = recorder.send()
        if problem is not None and not self._has_warned:
            self._has_warned = True
            self._print_status(
                f"MLflow does not accept metrics now ({problem}); "
                "training continues, and they are sent later"
            )
        return problem is None

    def _waiting_rows(self) -> Iterator[Row]:
        while True:
            try:
                yield self.rows.get_nowait()
            except Empty:
                return


def _milliseconds() -> int:
    """Return the time in milliseconds since 1970."""
    return int(1000 * time.time())
