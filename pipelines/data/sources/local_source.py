"""Open the rows of a local source, whatever its format, and list its splits."""

import csv
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

from pipelines.config.data_section import SourceSettings
from pipelines.config.recipe import local_path
from pipelines.data.sources.arrow_files import open_arrow, open_parquet, open_saved
from pipelines.data.sources.delimited_files import open_delimited
from pipelines.data.sources.file_discovery import SAVED_DICT, FoundFiles, find_files, is_saved
from pipelines.data.sources.file_formats import (
    DELIMITED_FORMATS,
    TEXT_FORMATS,
    DataFile,
    compression_of,
)
from pipelines.data.sources.json_rows import json_split_names, open_json, open_json_lines
from pipelines.data.sources.row_store import OpenedRows, ReadRows
from pipelines.data.sources.split_names import TRAIN, choose_split
from pipelines.data.sources.text_lines import open_text_lines
from pipelines.errors import DataError, one_line

SAVED = "saved data set"
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    RecursionError,
    zlib.error,
    lzma.LZMAError,
    csv.Error,
)
"""What reading a damaged file may raise."""


def open_local(settings: SourceSettings, path: str, *, setting: str = "split") -> OpenedRows:
    """Open the rows of a file, a folder, a pattern or a saved data set.

    Args:
        settings: how they are read.
        path: where the source is.
        setting: name of the setting that has the split.

    Raises:
        DataError: a setting has no effect, or the source cannot be read.
    """
    if settings.revision is not None:
        raise no_effect("revision", settings.revision, f"{path!r}, which is not on the hub")
    folder = local_path(path)
    if is_saved(folder):
        check_text_settings(settings, SAVED, path)
        if settings.config is not None:
            raise no_effect("config", settings.config, f"the {SAVED} {path!r}")
        with _reading(path, SAVED):
            opened = open_saved(folder, settings.split, setting=setting)
        return replace(opened, rows=_guarded(opened.rows, path, SAVED))
    found = find_files(settings, path)
    names = _names_of_splits(found, settings)
    split = None
    if names:
        split = choose_split(names, settings.split, path, setting=setting)
    elif settings.split is not None:
        where = f"{path!r}, which has no splits (data.max_rows limits the number of rows)"
        raise no_effect(setting, settings.split, where)
    if found.has_names:
        return _open_files(found.splits[str(split)], settings, path=path)
    return _open_files(found.splits[TRAIN], settings, path=path, key=split)


def split_names(settings: SourceSettings, path: str) -> tuple[str, ...]:
    """Return the names of a local source's splits; empty if nothing names any.

    Args:
        settings: configuration and encoding of the source.
        path: where the source is.
    """
    folder = local_path(path)
    if is_saved(folder):
        listing = folder / SAVED_DICT
        if not listing.is_file():
            return ()
        with _reading(path, SAVED):
            return tuple(json.loads(listing.read_text(encoding="utf-8"))["splits"])
    return _names_of_splits(find_files(settings, path), settings)


def effective_text_settings(settings: SourceSettings, path: str) -> dict[str, str | None]:
    """Return the encoding and the delimiter that files at a path can have.

    Args:
        settings: with the user's encoding and delimiter.
        path: where the source is.

    Returns:
        the settings that have an effect on all files, by name; None where the user sets nothing.
    """
    if is_saved(local_path(path)):
        return {}
    found = find_files(SourceSettings(), path)
    formats = {str(file.format) for file in chain.from_iterable(found.splits.values())}
    chosen = {}
    if formats <= TEXT_FORMATS:
        chosen["encoding"] = settings.encoding
    if formats <= DELIMITED_FORMATS:
        chosen["delimiter"] = settings.delimiter
    return chosen


def check_text_settings(settings: SourceSettings, kind: str, path: str) -> None:
    """Raise DataError if the encoding or the delimiter has no effect on a format.

    Args:
        settings: with the user's encoding and delimiter.
        kind: format of the files.
        path: of the source, in messages.

    Raises:
        DataError: one of them is set and has no effect.
    """
    where = f"{path!r}, which is read as {kind}"
    if settings.delimiter is not None and kind not in DELIMITED_FORMATS:
        raise no_effect("delimiter", settings.delimiter, where)
    if settings.encoding is not None and kind not in TEXT_FORMATS:
        raise no_effect("encoding", settings.encoding, where)


def no_effect(setting: str, value: str, where: str) -> DataError:
    """Return the error for a setting without effect.

    Args:
        setting: its key in the data section.
        value: what the user sets.
        where: what it does not affect, and why.
    """
    return DataError(f"data.{setting} {value!r} has no effect on {where}; remove it")


def _names_of_splits(found: FoundFiles, settings: SourceSettings) -> tuple[str, ...]:
    if found.has_names:
        return tuple(found.splits)
    files = found.splits[TRAIN]
    if len(files) > 1 or files[0].format != "json":
        return ()
    _check_files(files, str(files[0].path))
    with _reading(str(files[0].path), "json"):
        return json_split_names(files[0], settings.encoding)


def _open_files(
    files: Sequence[DataFile], settings: SourceSettings, *, path: str, key: str | None = None
) -> OpenedRows:
    """Open files of one format; their rows follow each other.

    Args:
        files: at least one.
        settings: how they are read.
        path: of the source, in messages.
        key: of the list in a .json file with several.
    """
    _check_files(files, path)
    check_text_settings(settings, str(files[0].format), path)
    opened = [_open_file(file, settings, key) for file in files]
    return OpenedRows(
        format=_joined([one.format for one in opened]) or "",
        rows=chain.from_iterable(one.rows for one in opened),
        files=len(files),
        encoding=_joined([one.encoding for one in opened]),
        delimiter=_joined([one.delimiter for one in opened]),
    )


def _check_files(files: Sequence[DataFile], path: str) -> None:
    """Raise DataError if the formats differ, or a file is empty or compressed in vain."""
    first = {file.format: file.name for file in reversed(files)}
    if len(first) > 1:
        names = ", ".join(sorted(first.values()))
        raise DataError(
            f"data source {path!r} has files of different formats ({names}); name the files to use "
            "by a pattern such as data/*.jsonl"
        )
    for file in files:
        if file.path.stat().st_size == 0:
            raise DataError(
                f"data file {str(file.path)!r} is empty; provide at least a few hundred rows, or "
                "remove it from its folder"
            )
        if file.format not in TEXT_FORMATS and compression_of(file.path) is not None:
            raise DataError(
                f"data file {str(file.path)!r} is a compressed {file.format} file, which cannot be "
                "read in parts; decompress it"
            )


def _open_file(file: DataFile, settings: SourceSettings, key: str | None) -> OpenedRows:
    kind = str(file.format)
    with _reading(str(file.path), kind):
        opened = _open_format(file, settings, key)
    return replace(opened, rows=_guarded(opened.rows, str(file.path), kind))


def _open_format(file: DataFile, settings: SourceSettings, key: str | None) -> OpenedRows:
    match file.format:
        case "json lines":
            return open_json_lines(file, settings.encoding)
        case "json":
            return open_json(file, settings.encoding, key)
        case "text lines":
            return open_text_lines(file, settings.encoding)
        case "parquet":
            return open_parquet(file)
        case "arrow":
            return open_arrow(file)
        case _:
            return open_delimited(file, settings.encoding, settings.delimiter)


def _guarded(rows: ReadRows, path: str, kind: str) -> ReadRows:
    with _reading(path, kind):
        yield from rows


@contextmanager
def _reading(path: str, kind: str) -> Iterator[None]:
    """Turn the errors of a damaged file into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except UNREADABLE as error:
        fix = "fix the file"
        if isinstance(error, UnicodeDecodeError):
            fix = "save it as UTF-8, or set data.encoding"
        reason = one_line(error, with_type=False)
        raise DataError(
            f"data source {path!r} cannot be read as {kind}: {reason}; {fix}"
        ) from error


def _joined(values: Sequence[str | None]) -> str | None:
    """Return the different values as text; None if there are none."""
    different = sorted({value for value in values if value is not None})
    return ", ".join(different) or None
