"""Show a training run while it goes on: a bar on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

SECONDS_BETWEEN_LINES = 15
LOG_WIDTH = 120
console = Console(file=sys.stderr)


@contextmanager
def training_progress(label: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what takes each new row of metrics and shows step, loss, tokens/s and the time left."""
    if console.is_terminal:
        with _bar() as bar:
            yield _Bar(bar, label)
    else:
        yield _Lines(label)


def say(text: str) -> None:
    """Print one line of what the run is doing, to stderr."""
    console.print(text, highlight=False)


def show(table: Table) -> None:
    """Print a table to stdout; where nobody gave a width, as in a log, it gets one in which no column is cut."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_WIDTH
    Console(width=width).print(table)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)


class _Bar:
    def __init__(self, bar: Progress, label: str) -> None:
        self.bar = bar
        self.task = bar.add_task(label, total=None, figures="starting")

    def __call__(self, row: dict[str, Any]) -> None:
        self.bar.update(self.task, total=row["steps"], completed=row["step"], figures=_figures(row))


class _Lines:
    def __init__(self, label: str) -> None:
        self.label, self.last, self.first = label, 0.0, None

    def __call__(self, row: dict[str, Any]) -> None:
        if row["step"] < row["steps"] and time.monotonic() - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = time.monotonic()
        left = (row["steps"] - row["step"]) * row["seconds"]
        say(f"  {self.label}: step {row['step']}/{row['steps']}, {_figures(row)}, {left:.0f} s left")


def _figures(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.3f}, {row['tokens'] / row['seconds']:.0f} tokens/s"
