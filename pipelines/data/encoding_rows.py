"""Rows to tokenized examples, in batches and on all cores; the result is in Arrow files.

A row becomes one example or, if the chat template rewrites earlier turns, one for each answer. A
row that cannot be learned as written becomes an entry with its error.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from pipelines.config.data_section import DataSection
from pipelines.data.rendering.example import Example
from pipelines.data.rendering.renderer import ExamplesOrError, Renderer
from pipelines.data.rows import PLACE, PROBLEM, ROW, SourceRows
from pipelines.data.schemas.schema import Schema
from pipelines.errors import DataError
from pipelines.runtime.interfaces.results import SourceFacts
from pipelines.runtime.stage import digest

BATCH_ROWS = 1000
ROWS_PER_PROCESS = 4_000
"""Fewer are encoded by one process: starting another takes longer."""
NO_TOKEN = -1
STORED = {
    "input_ids": List(Value("int32")),
    "supervised": List(Value("bool")),
    "prompt_tokens": Value("int32"),
    "reference": Value("large_string"),
    "group": Value("string"),
    "was_cut": Value("bool"),
    "length": Value("int32"),
    "supervised_tokens": Value("int32"),
}
"""Columns of the prepared splits."""
TEMPORARY = {
    "key": Value("string"),
    "end_token": Value("int32"),
    "notes": List(Value("string")),
    "error": Value("large_string"),
    "place": Value("string"),
}
"""Columns that only preparation uses. `key` is a digest of tokens and supervision; `error` is empty
for an example."""
FEATURES = Features({**STORED, **TEMPORARY})


@dataclass(frozen=True)
class RowEncoder:
    """Encodes batches of rows of one source."""

    schema: Schema
    tokenizer: PreTrainedTokenizerBase
    settings: DataSection
    group_column: str | None = None
    """Groups the rows; None to group them by the start of the conversation."""

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.settings)

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Return the columns of a batch's examples and errors."""
        readable = []
        for text, problem in zip(batch[ROW], batch[PROBLEM], strict=True):
            if not problem:
                readable.append(json.loads(text))
        outcomes = iter(self.encode(readable))
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for place, problem in zip(batch[PLACE], batch[PROBLEM], strict=True):
            if problem:
                _append(columns, _failed(problem, place))
                continue
            outcome = next(outcomes)
            if isinstance(outcome, DataError):
                _append(columns, _failed(str(outcome), place))
                continue
            for example in outcome:
                _append(columns, _stored(example, place))
        return columns

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[ExamplesOrError]:
        """Return the examples of each row, or why it cannot be learned.

        Args:
            rows: with the columns of the schema.

        Returns:
            one outcome for each row, in order; an error does not name the place of its row.
        """
        outcomes = list[ExamplesOrError]()
        parsed = []
        positions = []
        for row in rows:
            try:
                parsed.append(self.schema.parse(row))
            except DataError as error:
                outcomes.append(error)
                continue
            positions.append(len(outcomes))
            outcomes.append(())
        rendered = self._renderer.render(parsed)
        for position, outcome in zip(positions, rendered, strict=True):
            outcomes[position] = self._grouped(rows[position], outcome)
        return outcomes

    def _grouped(self, row: Mapping[str, Any], outcome: ExamplesOrError) -> ExamplesOrError:
        """Return the examples of a row, in the group that the recipe's column names."""
        column = self.group_column
        if column is None or isinstance(outcome, DataError):
            return outcome
        group = row.get(column)
        if group is None:
            return DataError(
                f"has no value in the column {column!r}, which data.group_column names; fill it, "
                "or remove the row"
            )
        if isinstance(group, float) and group.is_integer():
            group = int(group)  # a file can store one group as 1 and as 1.0
        return tuple(replace(example, group=str(group)) for example in outcome)


@dataclass(frozen=True)
class EncodedSource:
    """The examples of one source."""

    facts: SourceFacts
    rows: int
    """That were encoded."""
    examples: Dataset
    """See FEATURES."""
    weight: float = 1.0
    """How often each training example occurs in an epoch."""
    held_out: bool = False
    """These are the user's own validation rows."""


def encode(rows: SourceRows, encoder: RowEncoder, file: Path) -> Dataset:
    """Return the examples and errors of a source; `file` is where they are stored meanwhile.

    Args:
        rows: the source's, as written.
        encoder: is pickled into each process that encodes.
        file: Arrow file in which the examples are stored until the splits are saved.

    Returns:
        the columns of FEATURES, in the order of the rows.
    """
    return rows.table.map(
        encoder,
        batched=True,
        batch_size=BATCH_ROWS,
        num_proc=_processes(len(rows)),
        remove_columns=rows.table.column_names,
        features=FEATURES,
        cache_file_name=str(file),
        new_fingerprint=digest(str(file))[:16],
    )


def _processes(rows: int) -> int | None:
    """Return the number of processes; None for this one."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    count = min(available, rows // ROWS_PER_PROCESS)
    return count if count > 1 else None


def _append(columns: dict[str, list[Any]], values: Mapping[str, Any]) -> None:
    for name, column in columns.items():
        column.append(values[name])


def _stored(example: Example, place: str) -> dict[str, Any]:
    return {
        "input_ids": example.input_ids,
        "supervised": example.supervised,
        "prompt_tokens": example.prompt_tokens,
        "reference": example.reference,
        "group": example.group,
        "was_cut": example.was_cut,
        "length": len(example.input_ids),
        "supervised_tokens": sum(example.supervised),
        "key": _key(example),
        "end_token": NO_TOKEN if example.end_token is None else example.end_token,
        "notes": list(example.notes),
        "error": "",
        "place": place,
    }


def _key(example: Example) -> str:
    """Return a digest of an example's tokens and supervision."""
    tokens = np.asarray(example.input_ids, dtype="<i8")
    mask = np.asarray(example.supervised, dtype=bool)
    return hashlib.sha256(tokens.tobytes() + mask.tobytes()).hexdigest()


def _failed(error: str, place: str) -> dict[str, Any]:
    return {
        "input_ids": [],
        "supervised": [],
        "prompt_tokens": 0,
        "reference": "",
        "group": "",
        "was_cut": False,
        "length": 0,
        "supervised_tokens": 0,
        "key": "",
        "end_token": NO_TOKEN,
        "notes": [],
        "error": error,
        "place": place,
    }
