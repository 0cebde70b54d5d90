"""Write rows into files of every format."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict

Rows = Sequence[Mapping[str, Any]]
Writer = Callable[[Path], Path | str]
BOXES = 14
PAIRS = tuple((f"Which color has box {box}?", f"Box {box} is gray.") for box in range(BOXES))
"""Prompt and completion; each prompt is a separate group."""
OTHERS = tuple((f"Which color has lid {lid}?", f"Lid {lid} is red.") for lid in range(4))
"""Rows to hold out."""


def as_rows(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return pairs as rows."""
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def as_talks(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return pairs as rows with messages."""
    rows = []
    for prompt, completion in pairs:
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
        rows.append({"messages": turns})
    return rows


def json_lines(rows: Rows, *, end: str = "\n") -> str:
    """Return rows as JSON, each in one line."""
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def delimited(rows: Rows, delimiter: str = ",", *, end: str = "\r\n") -> str:
    """Return rows as delimited text with a header."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def text(name: str, content: str, encoding: str = "utf-8") -> Writer:
    """Return a writer of one text file."""
    return data(name, content.encode(encoding))


def data(name: str, content: bytes) -> Writer:
    """Return a writer of one file."""

    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def folder_of(*writers: Writer, pattern: str = "") -> Writer:
    """Return a writer of several files, whose source is the folder or a pattern in it."""

    def write(folder: Path) -> Path | str:
        for writer in writers:
            writer(folder)
        return f"{folder}/{pattern}" if pattern else folder

    return write


def gzipped(name: str, content: str) -> Writer:
    """Return a writer of a file that is compressed with gzip."""
    return data(name, gzip.compress(content.encode()))


def zstandard(name: str, content: str) -> Writer:
    """Return a writer of a file that is compressed with zstd."""

    def write(folder: Path) -> Path:
        path = folder / name
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content.encode())
        return path

    return write


def parquet(name: str, rows: Rows | pyarrow.Table) -> Writer:
    """Return a writer of a Parquet file."""

    def write(folder: Path) -> Path:
        table = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(list(rows))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, path)
        return path

    return write


def arrow(name: str, rows: Rows, *, is_stream: bool) -> Writer:
    """Return a writer of an Arrow file, in the stream or the file format."""

    def write(folder: Path) -> Path:
        table = pyarrow.Table.from_pylist(list(rows))
        path = folder / name
        open_writer = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, open_writer(sink, table.schema) as writer:
            writer.write_table(table)
        return path

    return write


def saved(rows: Rows) -> Writer:
    """Return a writer of a data set by `save_to_disk`."""

    def write(folder: Path) -> Path:
        Dataset.from_list(list(rows)).save_to_disk(str(folder / "saved"))
        return folder / "saved"

    return write


def saved_splits(**splits: Rows) -> Writer:
    """Return a writer of a data set with several splits by `save_to_disk`."""

    def write(folder: Path) -> Path:
        parts = {name: Dataset.from_list(list(rows)) for name, rows in splits.items()}
        DatasetDict(parts).save_to_disk(str(folder / "saved"))
        return folder / "saved"

    return write
