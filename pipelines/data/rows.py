"""Rows of a source as written, in Arrow files on disk: nothing infers their types."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from pipelines.runtime.interfaces.results import SourceFacts

ROW = "row"
"""Column with a row as JSON text."""
PLACE = "place"
"""Column that names the row in error messages, such as `line 3 of 'rows.jsonl'`."""
PROBLEM = "problem"
"""Column with the reason why the row cannot be read; empty if it can."""


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source."""

    table: Dataset
    """The columns `row`, `place` and `problem`, all text."""
    columns: tuple[str, ...]
    """Keys that occur in any row, in the order of their first occurrence."""
    facts: SourceFacts

    def __len__(self) -> int:
        return len(self.table)

    def contains(self, text: str) -> bool:
        """Return whether any row has a text, as JSON writes it."""
        written = json.dumps(text, ensure_ascii=False)[1:-1]
        found = pc.match_substring(self.table.data.column(ROW), written)
        return bool(pc.any(found).as_py())

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the place and the values of each row that can be read."""
        for batch in self.table.iter(batch_size=1000):
            for place, row, problem in zip(batch[PLACE], batch[ROW], batch[PROBLEM], strict=True):
                if not problem:
                    yield place, json.loads(row)
