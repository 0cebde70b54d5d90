"""metrics.jsonl: one line a step, from rank 0, cut back to the checkpoint that a resumed run starts from.

Of the whole step, all ranks and all parts of it together:

    step, steps          this one's number, from 1, and how many there are
    loss                 nats per supervised token
    learning_rate        of the first group of weights
    grad_norm            length of the gradient before it was shortened
    tokens               that were read, and supervised_tokens that were learnt from
    tokens_per_second    tokens over seconds

Of rank 0 alone:

    seconds              of the step
    seconds_of           of each phase since the row before: data, forward, backward, optimizer, communication; and checkpoint
                         or snapshot where one followed the step before, beyond this one's seconds
    peak_memory_bytes    so far; the largest of all ranks stands in the run's result
    time                 of the step's end, seconds since 1970
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_core.files import write_text

METRICS = "metrics.jsonl"
Row = dict[str, Any]


class Log:
    """The rows of one run."""

    def __init__(self, path: Path | None, first: int) -> None:
        """Take up the rows of the steps before `first`; without a path nothing is written."""
        self.path = path
        self.rows = [] if path is None else list(_rows(path))[:first]
        if path is not None:
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, row: Row) -> None:
        """Append a step."""
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")

    def mean_loss(self, steps: int) -> float:
        """Return the mean loss of the last steps."""
        last = self.rows[-steps:]
        return sum(float(row["loss"]) for row in last) / len(last)

    def summary(self) -> Row:
        """Return the figures of the whole run; the first step, which warms up, does not count for speed."""
        timed = self.rows[1:] or self.rows
        if not timed:
            return {}
        return {
            "steps": len(self.rows),
            "tokens": sum(row["tokens"] for row in self.rows),
            "supervised_tokens": sum(row["supervised_tokens"] for row in self.rows),
            "first_loss": self.rows[0]["loss"],
            "last_loss": self.rows[-1]["loss"],
            "tokens_per_second": round(
                sum(row["tokens"] for row in timed) / sum(row["seconds"] for row in timed), 1
            ),
            "training_seconds": round(sum(row["seconds"] for row in self.rows), 2),
        }


def _rows(path: Path) -> Iterator[Row]:
    """Yield the complete rows; a last line cut short by a kill is left out."""
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return
