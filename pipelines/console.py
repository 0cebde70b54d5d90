"""Progress of a running training: a bar on a terminal, a line from time to time elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def training_progress(label: str, *, lines: bool = True) -> Iterator[Watch]:
    """Yield a callback for new rows of metrics; it shows step, loss, tokens/s and time left.

    Without a terminal it prints a line from time to time, if `lines` is True.
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
        self.evaluated: Row = {}

    def __call__(self, row: Row) -> None:
        if "eval_loss" in row:
            self.evaluated = {"eval_loss": row["eval_loss"]}
        row = self.evaluated | row
        self.progress.update(
            self.task, total=row["steps"], completed=row["step"], metrics=_format_metrics(row)
        )


class Throttled:
    """Passes a row on every SECONDS_BETWEEN_LINES, each row with an evaluation, and the last."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.last_time = -inf

    def __call__(self, row: Row) -> None:
        always = row["step"] >= row["steps"] or "eval_loss" in row
        if not always and time.monotonic() - self.last_time < SECONDS_BETWEEN_LINES:
            return
        self.last_time = time.monotonic()
        self.watch(row)


def progress_line(label: str, row: Row) -> str:
    """Return the progress of a training as a line of a log."""
    left = (row["steps"] - row["step"]) * row["seconds"]
    return f"{label}: step {row['step']}/{row['steps']}, {_format_metrics(row)}, {left:.0f} s left"


def _format_metrics(row: Row) -> str:
    text = f"loss {row['loss']:.3f}, "
    if "eval_loss" in row:
        text += f"held-out loss {row['eval_loss']:.3f}, "
    return f"{text}{row['tokens'] / row['seconds']:.0f} tokens/s"
