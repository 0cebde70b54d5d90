"""A training in MLflow while it goes on: its rows of metrics and how the machine does, every few seconds, from a thread.

Training never waits for it: MLflow is imported in the thread, what it is told goes through a queue, and a server that is away
or refuses is named once. At the end a few seconds are given to what was not sent; the comparison's own run logs the whole
curve anyway.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from pipelines.console import Row, Watch
from pipelines.runtime.stage import Stage

SEND_SECONDS, LONGEST_PAUSE = 3.0, 30.0
"""Between two sendings, and at most where the server does not answer."""
END_SECONDS = 4.0
"""How long the end of a training waits for what was not sent."""
SAMPLING, SAMPLE_SECONDS = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", 10.0
"""MLflow's own variable that says how often the machine is looked at, and how often where it says nothing."""


@contextmanager
def live_run(stage: Stage, experiment: str, print_status: Callable[[str], None]) -> Iterator[Watch]:
    """Yield what takes each new row of a training's metrics, for the length of a block.

    The run is found again by the stage's key: a training that goes on, goes on in it. It ends FINISHED; FAILED where the block
    raises; KILLED where it is interrupted.

    Args:
        stage: the training's.
        experiment: name of MLflow's experiment; the comparison's.
        say: prints one line.
    """
    sender = _Sender(stage, experiment, print_status)
    thread = threading.Thread(target=sender.work, name="live metrics", daemon=True)
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
    """Return how often the machine is looked at: no more than once a second, and as by default where the variable is no number."""
    try:
        return max(1.0, float(os.environ.get(SAMPLING) or SAMPLE_SECONDS))
    except ValueError:
        return SAMPLE_SECONDS


class _Sender:
    """Works in a thread of its own until it is told how the training ended."""

    def __init__(self, stage: Stage, experiment: str, print_status: Callable[[str], None]) -> None:
        self.rows: SimpleQueue[Row] = SimpleQueue()
        self._told = (stage, experiment, int(1000 * time.time()))
        self._say, self._status, self._over = print_status, "", threading.Event()

    def end(self, status: str) -> None:
        self._status = status
        self._over.set()

    def work(self) -> None:
        from pipelines.tracking.recorder import Recorder  # imports MLflow, which takes seconds

        recorder = Recorder(*self._told)
        between = sampling_seconds()
        send_at, sample_at, pause, said = 0.0, time.monotonic() + between, SEND_SECONDS, False
        while True:
            over, now = self._over.is_set(), time.monotonic()
            recorder.take(self._waiting())
            if over or now >= sample_at:
                recorder.sample(int(1000 * time.time()))
                sample_at = now + between
            if over or now >= send_at:
                problem = recorder.send(self._status if over else None)
                if over:
                    return
                pause = SEND_SECONDS if problem is None else min(2 * pause, LONGEST_PAUSE)
                send_at = time.monotonic() + pause
                if problem is not None and not said:
                    said = True
                    self._say(
                        f"MLflow takes no metrics now ({problem}); training goes on, and they are sent later"
                    )
            self._over.wait(min(SEND_SECONDS, between))

    def _waiting(self) -> Iterator[Row]:
        while True:
            try:
                yield self.rows.get_nowait()
            except Empty:
                return
