"""Rows from .txt files: each line that is not blank is the text of a row."""

from pipelines.data.sources.file_formats import DataFile
from pipelines.data.sources.row_store import OpenedRows, ReadRows, make_row
from pipelines.data.sources.text_encoding import chosen_encoding, open_text


def open_text_lines(file: DataFile, encoding: str | None) -> OpenedRows:
    """Open a file of text lines.

    Args:
        file: may be compressed.
        encoding: the user's, if any.

    Raises:
        DataError: the encoding does not fit, or cannot be detected.
    """
    codec = chosen_encoding(file, encoding)
    return OpenedRows("text lines", _rows(file, codec), encoding=codec)


def _rows(file: DataFile, codec: str) -> ReadRows:
    with open_text(file, codec, "\n") as stream:
        for number, line in enumerate(stream, start=1):
            text = line.removesuffix("\n").removesuffix("\r")
            if text.strip():
                yield make_row(f"line {number} of {file.name!r}", {"text": text})
