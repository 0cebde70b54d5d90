"""Rows from JSON: one object per line, or a document with a list of objects.

Values are never converted: dates and numbers in strings stay strings.
"""

import json
from collections.abc import Iterator
from math import isinf
from typing import Any

from pipelines.data.sources.file_formats import DataFile
from pipelines.data.sources.json_document import JsonDocument
from pipelines.data.sources.row_store import LocatedRow, OpenedRows, ReadRows, RowProblem, make_row
from pipelines.data.sources.split_names import choose_split, listed_names
from pipelines.data.sources.text_encoding import (
    UTF_8,
    checked_encoding,
    open_text,
    unicode_encoding,
)
from pipelines.errors import DataError

JSON_SPACE = " \t\r\n"


class RowDecoder:
    """Decodes JSON and collects what the standard library accepts although it is not valid.

    These are repeated keys, of which it keeps the last, and NaN and infinities.
    """

    def __init__(self) -> None:
        self._problems: list[str] = []
        self.json = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_float=self._float,
            parse_constant=self._constant,
        )

    def forget_problems(self) -> None:
        """Ignore what was found in values that are not rows."""
        self._problems = []

    def row(self, place: str, value: Any) -> LocatedRow | RowProblem:
        """Return a decoded value as a row, or why it is not one.

        Args:
            place: of the row, in messages.
            value: as the decoder of this object has returned it.
        """
        problems = self._problems
        self.forget_problems()
        if problems:
            return RowProblem(place, problems[0])
        if not isinstance(value, dict):
            return RowProblem(place, 'is not a JSON object such as {"text": …}')
        return make_row(place, value)

    def line(self, place: str, content: str) -> LocatedRow | RowProblem:
        """Return the row of a line, or why it is not one.

        Args:
            place: of the row, in messages.
            content: the line without outer white space.
        """
        try:
            value = self.json.decode(content)
        except json.JSONDecodeError as error:
            return self._problem(place, f"is not valid JSON ({error.msg}, column {error.colno})")
        except (ValueError, RecursionError) as error:
            return self._problem(place, f"cannot be read ({error})")
        # An escaped character may be half of a surrogate pair, which is not valid text.
        has_escapes = "\\u" in content
        if self._problems or has_escapes or not isinstance(value, dict):
            return self.row(place, value)
        return LocatedRow(place, value, content)

    def _problem(self, place: str, reason: str) -> RowProblem:
        self.forget_problems()
        return RowProblem(place, reason)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = [name for name in names if names.count(name) > 1]
            self._problems.append(f"has the key {repeated[0]!r} more than once")
        return values

    def _float(self, text: str) -> float:
        value = float(text)
        if isinf(value):
            self._problems.append(f"has the number {text}, which is too large")
        return value

    def _constant(self, name: str) -> None:
        self._problems.append(f"has {name}, which is not valid JSON")


def open_json_lines(file: DataFile, encoding: str | None) -> OpenedRows:
    """Open a file with a JSON object per line.

    Args:
        file: may be compressed.
        encoding: the user's, if any.

    Raises:
        DataError: the file starts with a list, so a row is not a line.
    """
    codec = json_encoding(file, encoding)
    if first_character(file, codec) == "[":
        raise DataError(
            f"data file {str(file.path)!r} starts with a JSON list, where each line has to be an "
            'object such as {"text": …}; if it is one list of objects, let its name end in .json'
        )
    return OpenedRows("json lines", _line_rows(file, codec), encoding=codec)


def open_json(file: DataFile, encoding: str | None, split: str | None) -> OpenedRows:
    """Open a .json file: a list of objects, an object with such a list, or an object per line.

    Args:
        file: may be compressed.
        encoding: the user's, if any.
        split: key of the list, if the file has several.
    """
    codec = json_encoding(file, encoding)
    key = None
    if first_character(file, codec) == "{":
        lists, has_lines = _structure(file, codec)
        if has_lines:
            return OpenedRows("json lines", _line_rows(file, codec), encoding=codec)
        key = _choose_list(lists, split, file)
    return OpenedRows("json", _document_rows(file, codec, key), encoding=codec)


def json_split_names(file: DataFile, encoding: str | None) -> tuple[str, ...]:
    """Return the keys of a .json file's lists of rows if it has several.

    Args:
        file: .json; may be compressed.
        encoding: the user's, if any.

    Returns:
        empty if the file has one list, or an object on each line.
    """
    codec = json_encoding(file, encoding)
    if first_character(file, codec) != "{":
        return ()
    lists, has_lines = _structure(file, codec)
    names = tuple(name for name, has_rows in lists.items() if has_rows)
    if has_lines or len(names) < 2:
        return ()
    return names


def json_encoding(file: DataFile, encoding: str | None) -> str:
    """Return the encoding of a JSON file, which is UTF-8 if nothing indicates another one.

    Args:
        file: may be compressed.
        encoding: the user's, if any.
    """
    if encoding is not None:
        return checked_encoding(file, encoding)
    return unicode_encoding(file) or "utf-8"


def first_character(file: DataFile, codec: str) -> str:
    """Return the first character that is not white space; empty if there is none.

    Args:
        file: may be compressed.
        codec: of the file; bytes that it cannot decode are replaced.
    """
    with open_text(file, codec, "\n", errors="replace") as stream:
        return JsonDocument(stream, RowDecoder().json).next_character()


def _line_rows(file: DataFile, codec: str) -> ReadRows:
    # Undecodable bytes become lone surrogates, which identify the line.
    errors = "surrogateescape" if codec in UTF_8 else "strict"
    decoder = RowDecoder()
    with open_text(file, codec, "\n", errors=errors) as stream:
        for number, line in enumerate(stream, start=1):
            content = line.strip(JSON_SPACE)
            if not content:
                continue
            place = f"line {number} of {file.name!r}"
            if _is_decoded(content):
                yield decoder.line(place, content)
            else:
                yield RowProblem(
                    place, "is not valid UTF-8 (save the file so, or set data.encoding)"
                )


def _is_decoded(content: str) -> bool:
    if content.isascii():
        return True
    try:
        content.encode()
    except UnicodeEncodeError:
        return False
    return True


def _document_rows(file: DataFile, codec: str, key: str | None) -> ReadRows:
    """Yield the rows of the list that is the document, or of the one with that key."""
    decoder = RowDecoder()
    with open_text(file, codec, "\n") as stream:
        document = JsonDocument(stream, decoder.json)
        lists = [None] if key is None else document.members()
        for name in lists:
            if name != key:
                document.skip()
                decoder.forget_problems()
                continue
            for number, value in enumerate(document.elements(), start=1):
                place = f"row {number} of {file.name!r}"
                yield decoder.row(place, value)
        document.check_end()


def _structure(file: DataFile, codec: str) -> tuple[dict[str, bool], bool]:
    """Return what follows an object's opening brace, without keeping its rows in memory.

    Returns:
        Key of each list → whether its elements are objects; and whether another object follows, as
        in a file with an object per line.
    """
    lists: dict[str, bool] = {}
    with open_text(file, codec, "\n") as stream:
        document = JsonDocument(stream, RowDecoder().json)
        for key in document.members():
            if document.next_character() != "[":
                document.skip()
                continue
            if key in lists:
                raise ValueError(f"the key {key!r} occurs more than once")
            lists[key] = _has_objects(document.elements())
        return lists, document.next_character() == "{"


def _has_objects(elements: Iterator[Any]) -> bool:
    """Return whether the first element is an object; read all of them."""
    first = next(elements, None)
    for _ in elements:
        pass
    return isinstance(first, dict)


def _choose_list(lists: dict[str, bool], split: str | None, file: DataFile) -> str:
    """Return the key of the list with the rows."""
    with_rows = [key for key, has_rows in lists.items() if has_rows]
    if with_rows:
        return choose_split(with_rows, split, file.name)
    found = f"lists of other values ({listed_names(lists)})" if lists else "no list"
    raise DataError(
        f"data file {str(file.path)!r} is a JSON object with {found} instead of rows; write it as "
        'a list of objects, such as [{"text": …}, …], or as one object per line'
    )
