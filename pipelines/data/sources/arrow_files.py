"""Rows from Parquet and Arrow files, and from data sets that `save_to_disk` wrote."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, ReadInstruction, load_from_disk

from pipelines.data.sources.arrow_values import rows_of
from pipelines.data.sources.file_formats import DataFile
from pipelines.data.sources.row_store import OpenedRows, ReadRows, make_row
from pipelines.data.sources.split_names import TRAIN, choose_split
from pipelines.errors import DataError

BATCH_ROWS = 1000
Batch: TypeAlias = pyarrow.RecordBatch | pyarrow.Table


def open_parquet(file: DataFile) -> OpenedRows:
    """Open a Parquet file."""
    return OpenedRows("parquet", batch_rows(_parquet_batches(file.path), file.name))


def open_arrow(file: DataFile) -> OpenedRows:
    """Open an Arrow file, in the stream or the file format."""
    return OpenedRows("arrow", batch_rows(_arrow_batches(file.path), file.name))


def open_saved(folder: Path, split: str | None, *, setting: str = "split") -> OpenedRows:
    """Open a folder that `save_to_disk` wrote.

    Args:
        folder: of a Dataset or a DatasetDict.
        split: a split or a part of it, such as train[:20]; by default `train` or the only one.
        setting: name of the setting that has the split.

    Raises:
        DataError: there is no such split.
    """
    saved = load_from_disk(str(folder))
    splits = saved
    if not isinstance(saved, DatasetDict):
        splits = {str(saved.split or TRAIN): saved}
    parts = _parts(splits, split, str(folder), setting)
    files = sum(len(part.cache_files) for part in parts)
    return OpenedRows("saved data set", dataset_rows(parts, folder.name), files=files)


def dataset_rows(parts: Iterable[Dataset], name: str) -> ReadRows:
    """Yield the rows of data sets one after the other.

    Args:
        parts: data sets that are memory-mapped.
        name: of the source, in places such as `row 3 of 'name'`.
    """
    tables = chain.from_iterable(
        part.with_format("arrow").iter(batch_size=BATCH_ROWS) for part in parts
    )
    return batch_rows(tables, name)


def batch_rows(batches: Iterable[Batch], name: str) -> ReadRows:
    """Yield the rows of batches; `name` is that of the source, in places.

    Args:
        batches: with equal schemas, in order.
        name: of the source, in places such as `row 3 of 'name'`.
    """
    number = 0
    for batch in batches:
        for values in rows_of(batch):
            number += 1
            yield make_row(f"row {number} of {name!r}", values)


def _parts(
    splits: dict[str, Dataset], split: str | None, source: str, setting: str
) -> list[Dataset]:
    """Return the data set of a split, or the parts that an instruction selects."""
    if split is None or split in splits:
        return [splits[choose_split(splits, split, source, setting=setting)]]
    lengths = {name: len(rows) for name, rows in splits.items()}
    try:
        selected = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"data.{setting} {split!r} is not a split of {source!r}, which has "
            f"{', '.join(splits)}, or a part of one such as {next(iter(splits))}[:100] ({error}); "
            "name one of them"
        ) from error
    parts = []
    for part in selected:
        rows = splits[part.splitname]
        start = part.from_ or 0
        end = len(rows) if part.to is None else part.to
        parts.append(rows.select(range(start, end)))
    return parts


def _parquet_batches(path: Path) -> Iterator[Batch]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS)


def _arrow_batches(path: Path) -> Iterator[Batch]:
    with pyarrow.memory_map(str(path)) as source:
        for batch in _record_batches(source):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)


def _record_batches(source: pyarrow.NativeFile) -> Iterator[Batch]:
    try:
        reader = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        yield from pyarrow.ipc.open_stream(source)
        return
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)
