"""Show a training run while it goes on: a bar on a terminal, a line now and then elsewhere."""

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


@contextmanager
def training_progress(label: str, *, lines: bool = True) -> Iterator[Watch]:
    """Yield what takes each new row of metrics and shows step, loss, tokens/s and the time left.

    Without a terminal it prints a line now and then, if `lines` are wanted.
    """
    if console.is_terminal:
        with _bar() as bar:
            yield _Bar(bar, label)
    elif lines:
        yield Throttled(lambda row: print_status(f"  {progress_line(label, row)}"))
    else:
        yield fan_out()


def fan_out(*watches: Watch) -> Watch:
    """Return one that passes each row on to several."""

    def watch(row: Row) -> None:
        for one in watches:
            one(row)

    return watch


def print_status(text: str, *, mark: str = "", aside: str = "") -> None:
    """Print one line of what the run is doing, to stderr, as it is: an error's brackets are no markup, a log's lines stay whole.

    Args:
        text: the line.
        mark: one of MARKS before it.
        aside: what matters less, after it.
    """
    line = Text(f"{mark} ", style=MARKS[mark]) if mark else Text()
    line.append(text, style="default")
    console.print(
        line.append(f" {aside}", style="dim") if aside else line, soft_wrap=not console.is_terminal
    )


def show(table: Table) -> None:
    """Print a table to stdout; where nobody gave a width, as in a log, it gets one in which no column is cut."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_WIDTH
    Console(width=width).print(table)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    return Progress(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console
    )


class _Bar:
    def __init__(self, bar: Progress, label: str) -> None:
        self.bar = bar
        self.task = bar.add_task(label, total=None, figures="starting")

    def __call__(self, row: Row) -> None:
        self.bar.update(self.task, total=row["steps"], completed=row["step"], figures=_figures(row))


class Throttled:
    """Passes a row on now and then, and the last one."""

    def __init__(self, show: Watch) -> None:
        self.show, self.last = show, -inf

    def __call__(self, row: Row) -> None:
        if row["step"] < row["steps"] and time.monotonic() - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = time.monotonic()
        self.show(row)


def progress_line(label: str, row: Row) -> str:
    """Say how far a training is, in a line of a log."""
    left = (row["steps"] - row["step"]) * row["seconds"]
    return f"{label}: step {row['step']}/{row['steps']}, {_figures(row)}, {left:.0f} s left"


def _figures(row: Row) -> str:
    return f"loss {row['loss']:.3f}, {row['tokens'] / row['seconds']:.0f} tokens/s"
