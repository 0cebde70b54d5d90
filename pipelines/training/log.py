"""metrics.jsonl: one line per step, from rank 0, truncated to the checkpoint that a run resumes.

Of the complete step, over all ranks and all micro-batches:

    step, steps          number of this step, from 1, and of all steps
    loss                 nats per supervised token
    eval_loss            the same on the held-out tuning examples after this step; absent if they
                         were not evaluated
    learning_rate        of the first group of weights
    grad_norm            gradient norm before clipping
    tokens               tokens read, and supervised_tokens
    tokens_per_second    tokens over seconds

Of rank 0 alone:

    seconds              of the step
    seconds_of           of each phase since the previous row: data, forward, backward, optimizer,
                         communication (see `phase_timer`); and checkpoint, snapshot or evaluation
                         if one followed the previous step, in addition to this step's seconds
    peak_memory_bytes    so far; the largest of all ranks is in the run's result
    time                 of the step's end, seconds since 1970
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_core.files import write_text
from pipelines.runtime.interfaces.results import TrainingTotals

METRICS = "metrics.jsonl"
Row = dict[str, Any]


class Log:
    """The rows of one run."""

    def __init__(self, path: Path | None, first: int) -> None:
        """Keep the rows of the first `first` steps; without a path, write nothing."""
        self.path = path
        self.rows = [] if path is None else list(_rows(path))[:first]
        if path is not None:
            write_text(path, "".join(_line(row) for row in self.rows))

    def write(self, row: Row) -> None:
        """Append a step."""
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as stream:
                stream.write(_line(row))

    def mean_loss(self, steps: int) -> float:
        """Return the mean loss of the last steps."""
        last = self.rows[-steps:]
        return sum(float(row["loss"]) for row in last) / len(last)

    def totals(self) -> TrainingTotals:
        """Return the totals of the run; the first step is a warm-up and not counted for speed."""
        timed = self.rows[1:] or self.rows
        tokens_per_second = _total(timed, "tokens") / _total(timed, "seconds")
        return TrainingTotals(
            steps=len(self.rows),
            tokens=_total(self.rows, "tokens"),
            supervised_tokens=_total(self.rows, "supervised_tokens"),
            first_loss=self.rows[0]["loss"],
            last_loss=self.rows[-1]["loss"],
            tokens_per_second=round(tokens_per_second, 1),
            training_seconds=round(_total(self.rows, "seconds"), 2),
        )


def _total(rows: list[Row], key: str) -> Any:
    return sum(row[key] for row in rows)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _rows(path: Path) -> Iterator[Row]:
    """Yield the complete rows; skip a last line that a kill truncated."""
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
