"""Write rows to an Arrow file in batches, so that memory does not grow with their number.

A reader yields a `LocatedRow` for each row, or a `RowProblem` for one that cannot be read. All
problems of a source are counted and reported in one error, unless they are stored as bad rows.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import pyarrow
from datasets import Dataset

from pipelines.data.rows import PLACE, PROBLEM, ROW, SourceRows
from pipelines.errors import DataError
from pipelines.runtime.interfaces.results import SourceFacts

SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in (ROW, PLACE, PROBLEM)])
BATCH_ROWS = 1000
BATCH_CHARACTERS = 1 << 24
LISTED_PROBLEMS = 5


class LocatedRow(NamedTuple):
    """A row and where it was read."""

    place: str
    values: dict[str, Any]
    text: str
    """The row as JSON."""


class RowProblem(NamedTuple):
    """Why a row cannot be read."""

    place: str
    reason: str
    """Follows the place in a sentence, such as `is not valid JSON`."""


ReadRows = Iterator[LocatedRow | RowProblem]


@dataclass(frozen=True)
class OpenedRows:
    """Rows of a source that have not been read yet."""

    format: str
    rows: ReadRows
    files: int = 1
    encoding: str | None = None
    delimiter: str | None = None


@dataclass
class _Batch:
    rows: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    characters: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.rows) >= BATCH_ROWS or self.characters >= BATCH_CHARACTERS

    def add(self, row: LocatedRow) -> None:
        self.rows.append(row.text)
        self.places.append(row.place)
        self.problems.append("")
        self.characters += len(row.text)

    def add_problem(self, problem: RowProblem) -> None:
        self.rows.append("{}")
        self.places.append(problem.place)
        self.problems.append(problem.reason)


def make_row(place: str, values: dict[str, Any]) -> LocatedRow | RowProblem:
    """Return a row, or a problem if it has text that is not valid Unicode.

    Args:
        place: of the row, in messages.
        values: by column; must be JSON values.
    """
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = text[error.start]
        return RowProblem(
            place,
            f"has a lone surrogate {character!a} in {_column_with(character, values)}, which "
            "is not valid text",
        )
    return LocatedRow(place, values, text)


def store_rows(
    opened: OpenedRows, source: str, cache: Path, *, keeps_problems: bool = False
) -> SourceRows:
    """Write the rows of a source to a new folder in the cache.

    Args:
        opened: the rows, which are read once.
        source: its name in messages.
        cache: a folder.
        keeps_problems: store a row that cannot be read with its problem, instead of raising.

    Raises:
        DataError: some rows cannot be read, or there are none.
    """
    path = Path(mkdtemp(dir=cache)) / "rows.arrow"
    columns: dict[str, None] = {}
    problems = _ProblemList()
    with pyarrow.ipc.new_stream(str(path), SCHEMA) as stream:
        for batch in _batches(opened.rows, columns, problems):
            values = [batch.rows, batch.places, batch.problems]
            stream.write_batch(pyarrow.record_batch(values, schema=SCHEMA))
    table = Dataset.from_file(str(path))
    all_are_bad = problems.total == len(table)
    if problems.total and (all_are_bad or not keeps_problems):
        raise problems.error(source)
    if len(table) == 0:
        raise DataError(f"data source {source!r} has no rows; provide at least a few hundred")
    facts = SourceFacts(
        source=source,
        format=opened.format,
        rows=len(table),
        files=opened.files,
        encoding=opened.encoding,
        delimiter=opened.delimiter,
    )
    return SourceRows(table, tuple(columns), facts)


@dataclass
class _ProblemList:
    total: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, problem: RowProblem) -> None:
        self.total += 1
        if len(self.first) < LISTED_PROBLEMS:
            self.first.append(f"{problem.place} {problem.reason}")

    def error(self, source: str) -> DataError:
        listed = "; ".join(self.first)
        if self.total == 1:
            return DataError(f"data source {source!r}: {listed}; fix or remove it")
        more = self.total - len(self.first)
        rest = f"; and {more:,} more" if more else ""
        return DataError(
            f"{self.total:,} rows of data source {source!r} cannot be read: {listed}{rest}; "
            "fix or remove them"
        )


def _batches(
    rows: Iterable[LocatedRow | RowProblem], columns: dict[str, None], problems: _ProblemList
) -> Iterator[_Batch]:
    """Yield batches; fill in the columns and problems."""
    batch = _Batch()
    for row in rows:
        if isinstance(row, RowProblem):
            problems.add(row)
            batch.add_problem(row)
        else:
            if not row.values.keys() <= columns.keys():
                columns.update(dict.fromkeys(row.values))
            batch.add(row)
        if batch.is_full:
            yield batch
            batch = _Batch()
    if batch.rows:
        yield batch


def _column_with(character: str, values: dict[str, Any]) -> str:
    for name, value in values.items():
        if character in json.dumps(value, ensure_ascii=False):
            return ascii(name)
    return "a column name"
