"""Rows from .csv and .tsv files: each cell is text, exactly as it is written.

The delimiter is the one that divides the header and the first rows into the same number of cells.
"""

import csv
from collections.abc import Iterator
from itertools import islice
from typing import IO

from pipelines.data.sources.file_formats import DataFile
from pipelines.data.sources.row_store import OpenedRows, ReadRows, RowProblem, make_row
from pipelines.data.sources.text_encoding import chosen_encoding, open_text
from pipelines.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
SAMPLE_RECORDS = 500
LONGEST_CELL = 1 << 27


def open_delimited(file: DataFile, encoding: str | None, delimiter: str | None) -> OpenedRows:
    """Open a file of delimited cells; detect what the user does not name."""
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
        _check_header(header, file)
        for line, cells in records:
            place = f"line {line} of {file.name!r}"
            if len(cells) == len(header):
                yield make_row(place, dict(zip(header, cells, strict=True)))
            else:
                yield RowProblem(
                    place,
                    f"has {len(cells)} cells, but the header has {len(header)} (quote cells that "
                    f"contain the delimiter {delimiter!r}, or set data.delimiter)",
                )


def _records(stream: IO[str], delimiter: str, file: DataFile) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of each record; skip empty lines."""
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
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _check_header(header: list[str], file: DataFile) -> None:
    for number, name in enumerate(header, start=1):
        if not name.strip():
            raise DataError(
                f"column {number} of {str(file.path)!r} has no name in the header; name it, or "
                "write the file without an index column"
            )
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(
            f"the header of {str(file.path)!r} has {repeated[0]!r} more than once; rename one of "
            "the columns"
        )


def _checked_delimiter(delimiter: str) -> str:
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(
            f"data.delimiter {delimiter!r} is not a single character other than a quote or a line "
            'end; use one such as ";" (a tab is "\\t" in double quotes)'
        )
    return delimiter


def _detect_delimiter(file: DataFile, codec: str) -> str:
    """Return the delimiter of a file; the usual one if there is only one column."""
    counts = {one: _cell_counts(file, codec, one) for one in DELIMITERS}
    candidates = [one for one in DELIMITERS if counts[one][:1] > [1]]
    consistent = [one for one in candidates if len(set(counts[one])) == 1]
    if len(consistent) == 1:
        return consistent[0]
    if len(candidates) <= 1:
        return candidates[0] if candidates else DELIMITERS[0]
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
