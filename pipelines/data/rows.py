"""Rows of a source as written, in Arrow files on disk: nothing infers their types."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from pipelines.runtime.interfaces.results import SourceFacts

ROW = "row"
"""Column with a row as JSON text."""
PLACE = "place"
"""Column that names the row in error messages, such as `line 3 of 'rows.jsonl'`."""


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source."""

    table: Dataset
    """The columns `row` and `place`, both text."""
    columns: tuple[str, ...]
    """Keys that occur in any row, in the order of their first occurrence."""
    facts: SourceFacts

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the place of each row and its values."""
        for batch in self.table.iter(batch_size=1000):
            for place, row in zip(batch[PLACE], batch[ROW], strict=True):
                yield place, json.loads(row)
