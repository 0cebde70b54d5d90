"""Progress of a running training: a bar on a terminal, a line from time to time elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 15
LOG_WIDTH = 120
MARKS = {"✓": "green", "✗": "yellow", "…": "yellow"}
console = Console(file=sys.stderr)

Row = dict[str, Any]
"""One line of a training's metrics.jsonl."""
Watch = Callable[[Row], None]
"""Called with each new row of metrics."""


@dataclass(frozen=True)
class StepProgress:
    """What is shown of a row of metrics."""

    step: int
    """Steps taken."""
    steps: int
    """Of the training."""
    loss: float
    """Nats per supervised token of this step."""
    tokens: int
    """Read in this step."""
    seconds: float
    """Of this step."""
    eval_loss: float | None
    """Held-out loss in nats per supervised token; None if it was not evaluated after this step."""

    @classmethod
    def of(cls, row: Row) -> "StepProgress":
        """Return what a row has of it."""
        return cls(
            step=row["step"],
            steps=row["steps"],
            loss=row["loss"],
            tokens=row["tokens"],
            seconds=row["seconds"],
            eval_loss=row.get("eval_loss"),
        )

    @property
    def is_last(self) -> bool:
        """Whether the training has ended."""
        return self.step >= self.steps

    @property
    def percent(self) -> float:
        """The fraction of the steps that were taken."""
        return 100 * self.step / self.steps

    @property
    def metrics(self) -> str:
        """Losses and speed."""
        held_out = ""
        if self.eval_loss is not None:
            held_out = f"held-out loss {self.eval_loss:.3f}, "
        tokens_per_second = self.tokens / self.seconds
        return f"loss {self.loss:.3f}, {held_out}{tokens_per_second:.0f} tokens/s"


@contextmanager
def training_progress(label: str, *, lines: bool = True) -> Iterator[Watch]:
    """Yield a callback for new rows of metrics; it shows step, loss, tokens/s and time left.

    Args:
        label: of the training.
        lines: print a line from time to time if stderr is not a terminal.
    """
    if console.is_terminal:
        with _progress() as progress:
            yield _TerminalBar(progress, label)
    elif lines:
        yield Throttled(lambda row: print_status(f"  {progress_line(label, row)}"))
    else:
        yield fan_out()


def fan_out(*watches: Watch) -> Watch:
    """Return a callback that passes each row on to several."""

    def watch(row: Row) -> None:
        for receive in watches:
            receive(row)

    return watch


def print_status(text: str, *, mark: str = "", aside: str = "") -> None:
    """Print one line about the run to stderr, verbatim: without markup, and unbroken in a log.

    Args:
        text: the line.
        mark: one of MARKS, printed first.
        aside: less important text, printed last.
    """
    line = Text(f"{mark} ", style=MARKS[mark]) if mark else Text()
    line.append(text, style="default")
    if aside:
        line.append(f" {aside}", style="dim")
    console.print(line, soft_wrap=not console.is_terminal)


def print_table(table: Table) -> None:
    """Print a table to stdout.

    Without a known width, as in a log, use one in which every column fits.
    """
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = None if has_width else LOG_WIDTH
    Console(width=width).print(table)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


class _TerminalBar:
    def __init__(self, progress: Progress, label: str) -> None:
        self.progress = progress
        self.task = progress.add_task(label, total=None, metrics="starting")
        self.eval_loss: float | None = None
        """Of the last evaluation."""

    def __call__(self, row: Row) -> None:
        shown = StepProgress.of(row)
        if shown.eval_loss is None:
            shown = replace(shown, eval_loss=self.eval_loss)
        self.eval_loss = shown.eval_loss
        self.progress.update(
            self.task, total=shown.steps, completed=shown.step, metrics=shown.metrics
        )


class Throttled:
    """Passes a row on every SECONDS_BETWEEN_LINES, each row with an evaluation, and the last."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.last_time = -inf

    def __call__(self, row: Row) -> None:
        progress = StepProgress.of(row)
        always = progress.is_last or progress.eval_loss is not None
        if not always and time.monotonic() - self.last_time < SECONDS_BETWEEN_LINES:
            return
        self.last_time = time.monotonic()
        self.watch(row)


def progress_line(label: str, row: Row) -> str:
    """Return the progress of a training as a line of a log.

    Args:
        label: of the training.
        row: of its metrics.
    """
    progress = StepProgress.of(row)
    steps_left = progress.steps - progress.step
    seconds_left = steps_left * progress.seconds
    step = f"step {progress.step}/{progress.steps}"
    return f"{label}: {step}, {progress.metrics}, {seconds_left:.0f} s left"
