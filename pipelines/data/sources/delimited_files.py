"""Rows from .csv and .tsv files: each cell is text, exactly as it is written.

The delimiter is the one that divides the header and the first rows into the same number of cells,
or that a first line such as `sep=;` names (Excel). A column without a name in the header is read
only if it is harmless: the numbers of rows in the first column (pandas), or empty cells.
"""

import csv
import re
from collections.abc import Iterator
from itertools import islice
from reprlib import repr as truncated
from typing import IO

from pipelines.data.sources.file_formats import DataFile
from pipelines.data.sources.row_store import OpenedRows, ReadRows, RowProblem, make_row
from pipelines.data.sources.text_encoding import chosen_encoding, open_text
from pipelines.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
SAMPLE_RECORDS = 500
LONGEST_CELL = 1 << 27
_NAMED_DELIMITER = re.compile(r'"?sep=(.)"?', re.IGNORECASE)


def open_delimited(file: DataFile, encoding: str | None, delimiter: str | None) -> OpenedRows:
    """Open a file of delimited cells; detect what the user does not name.

    Args:
        file: .csv or .tsv; may be compressed.
        encoding: the user's, if any.
        delimiter: the user's, if any.

    Raises:
        DataError: encoding or delimiter are not known, or the file contradicts them.
    """
    codec = chosen_encoding(file, encoding)
    kind = str(file.format)
    if delimiter is not None:
        separator = _checked_delimiter(delimiter)
    elif kind == "tsv":
        separator = "\t"
    else:
        separator = _detect_delimiter(file, codec)
    rows = _rows(file, codec, separator)
    return OpenedRows(kind, rows, encoding=codec, delimiter=separator)


def _rows(file: DataFile, codec: str, delimiter: str) -> ReadRows:
    with open_text(file, codec, "") as stream:
        records = _records(stream, delimiter, file)
        _, header = next(records, (1, []))
        unnamed = [index for index, name in enumerate(header) if not name.strip()]
        names = _column_names(header, file)
        for line, cells in records:
            place = f"line {line} of {file.name!r}"
            problem = _problem(cells, names, unnamed, delimiter)
            if problem:
                yield RowProblem(place, problem)
                continue
            values = dict(zip(names, cells, strict=True))
            yield make_row(place, values)


def _problem(cells: list[str], names: list[str], unnamed: list[int], delimiter: str) -> str:
    """Return why a record is not a row; empty if it is one."""
    if len(cells) != len(names):
        return (
            f"has {len(cells)} cells, but the header has {len(names)} (quote cells that contain "
            f"the delimiter {delimiter!r}, or set data.delimiter)"
        )
    for index in unnamed:
        cell = cells[index]
        is_row_number = index == 0 and cell.isdecimal()
        if cell.strip() and not is_row_number:
            return (
                f"has {truncated(cell)} in column {index + 1}, which has no name in the "
                f"header (name it, or quote cells that contain the delimiter {delimiter!r})"
            )
    return ""


def _records(stream: IO[str], delimiter: str, file: DataFile) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of each record; skip empty lines and `sep=;`."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"the record in line {line} of {str(file.path)!r} is not valid {file.format} "
                f"({error}); write quotes within a quoted cell twice and close each of them"
            ) from error
        if cells is None:
            return
        is_data = line > 1 or not _NAMED_DELIMITER.fullmatch(delimiter.join(cells))
        if cells and is_data:
            yield line, cells
        line = reader.line_num + 1


def _column_names(header: list[str], file: DataFile) -> list[str]:
    """Return a name for each column; those without one get their number."""
    names = []
    for number, name in enumerate(header, start=1):
        names.append(name if name.strip() else f"column {number}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"the header of {str(file.path)!r} has {repeated[0]!r} more than once; rename one of "
            "the columns"
        )
    return names


def _checked_delimiter(delimiter: str) -> str:
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(
            f"data.delimiter {delimiter!r} is not a single character other than a quote or a line "
            'end; use one such as ";" (a tab is "\\t" in double quotes)'
        )
    return delimiter


def _detect_delimiter(file: DataFile, codec: str) -> str:
    """Return the delimiter of a file; the usual one if there is only one column."""
    with open_text(file, codec, "") as stream:
        named = _NAMED_DELIMITER.fullmatch(stream.readline().rstrip("\r\n"))
    if named:
        return named[1]
    candidates = []
    consistent = []
    for delimiter in DELIMITERS:
        counts = _cell_counts(file, codec, delimiter)
        if not counts or counts[0] < 2:
            continue
        candidates.append(delimiter)
        if len(set(counts)) == 1:
            consistent.append(delimiter)
    if len(consistent) == 1:
        return consistent[0]
    if not candidates:
        return DELIMITERS[0]
    if len(candidates) == 1:
        return candidates[0]
    raise DataError(
        f"the header of {str(file.path)!r} has {' and '.join(map(repr, candidates))}, and each may "
        "be the delimiter; set data.delimiter"
    )


def _cell_counts(file: DataFile, codec: str, delimiter: str) -> list[int]:
    """Return the number of cells of the header and of the first records.

    It ends with 0 if the records are not valid with this delimiter.
    """
    counts = []
    try:
        with open_text(file, codec, "") as stream:
            for _, cells in islice(_records(stream, delimiter, file), SAMPLE_RECORDS):
                counts.append(len(cells))
    except DataError:
        counts.append(0)
    return counts
