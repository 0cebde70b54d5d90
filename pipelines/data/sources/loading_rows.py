"""Load the rows of a data source exactly as they are written.

stdlib_docstrings.py  functions of the standard library
file_discovery.py     files of a folder, a pattern or a cloned data set
file_formats.py       suffixes and compressions
split_names.py        names of splits
dataset_card.py       configurations of a cloned data set
local_source.py       any local source
json_rows.py          .jsonl and .json, with json_document.py
delimited_files.py    .csv and .tsv
text_lines.py         .txt
text_encoding.py      encodings of text files
arrow_files.py        .parquet, .arrow and saved data sets, with arrow_values.py
remote_files.py       addresses such as s3://bucket/rows.jsonl
hub.py                data sets of the Hugging Face Hub
row_store.py          rows → an Arrow file of JSON texts
"""

from collections.abc import Iterator
from pathlib import Path

from pipelines.config.data_section import (
    DOCSTRINGS,
    MAX_SOURCE_CHARACTERS,
    DataSection,
    SourceSettings,
    WeightedSource,
)
from pipelines.config.recipe import local_path
from pipelines.data.rows import SourceRows
from pipelines.data.sources.file_discovery import is_pattern, is_remote
from pipelines.data.sources.file_formats import compression_of, format_of
from pipelines.data.sources.hub import is_hub_id, open_hub
from pipelines.data.sources.local_source import (
    check_text_settings,
    effective_text_settings,
    no_effect,
    open_local,
    split_names,
)
from pipelines.data.sources.remote_files import download
from pipelines.data.sources.row_store import OpenedRows, ReadRows, make_row, store_rows
from pipelines.data.sources.split_names import TRAIN, choose_split, validation_name
from pipelines.data.sources.stdlib_docstrings import stdlib_pairs
from pipelines.errors import DataError


def load_source(
    source: WeightedSource,
    *,
    path: str | None = None,
    cache: Path,
    settings: DataSection | None = None,
    split_setting: str = "split",
) -> SourceRows:
    """Load the rows of a source; `max_rows` is not applied.

    Args:
        source: its name and how it is read.
        path: where a local file, folder or pattern was found; by default as the source names it.
        cache: a folder for Arrow files, which are not used by another preparation.
        settings: the recipe's data section: the longest function of `docstrings`, and whether rows
            that cannot be read are removed later; None for the defaults.
        split_setting: name of the setting that has the split, in messages.

    Raises:
        DataError: the source is missing, empty or malformed (with the line), or a setting has no
            effect on it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    max_source_characters = MAX_SOURCE_CHARACTERS
    keeps_problems = False
    if settings is not None:
        max_source_characters = settings.max_source_characters
        keeps_problems = settings.bad_rows == "drop"
    if source.source == DOCSTRINGS:
        _check_docstrings(source)
        opened = OpenedRows("docstrings", _docstring_rows(max_source_characters), files=0)
    else:
        location = _locate(source.source, path, cache)
        if _is_local(location):
            opened = open_local(source, location, setting=split_setting)
        else:
            check_text_settings(source, "hub data set", source.source)
            opened = open_hub(source.source, source)
    return store_rows(opened, source.source, cache, keeps_problems=keeps_problems)


def load_validation(
    settings: DataSection, *, path: str | None, validation_path: str | None, cache: Path
) -> SourceRows | None:
    """Load the rows that the user holds out; None if there are none.

    These are the rows of `validation_source`; those of `validation_split`; or those of a split of
    the source named validation, valid, val, dev, eval or test. Of a hub data set, only
    `validation_split` is used.

    Args:
        settings: the recipe's data section.
        path: where its source was found, if it is local.
        validation_path: where its validation source was found, if it is local.
        cache: a folder for Arrow files.

    Raises:
        DataError: as `load_source`.
    """
    if settings.validation_source is not None:
        return _load_other_source(settings, settings.validation_source, validation_path, cache)
    if len(settings.all_sources) == 1:
        source = _held_out_source(settings, path, cache)
    elif settings.validation_split is None:
        source = None
    else:
        raise DataError(
            f"data.validation_split {settings.validation_split!r} needs a single source, and "
            "data.sources lists several; name a data.validation_source"
        )
    if source is None:
        return None
    setting = "split" if settings.validation_split is None else "validation_split"
    return load_source(source, path=path, cache=cache, settings=settings, split_setting=setting)


def _locate(source: str, path: str | None, cache: Path) -> str:
    """Return where a source is: its path on this machine, or its hub id."""
    location = path or source
    return download(location, cache) if is_remote(location) else location


def _is_local(location: str) -> bool:
    """Return whether a source is, or has to be, on this machine."""
    path = local_path(location)
    if path.exists() or is_pattern(location):
        return True
    return _has_data_suffix(path) or not is_hub_id(location)


def _has_data_suffix(path: Path) -> bool:
    return format_of(path) is not None or compression_of(path) is not None


def _check_docstrings(source: SourceSettings) -> None:
    for setting in ("config", "revision", "split", "encoding", "delimiter"):
        value = getattr(source, setting)
        if value is not None:
            raise no_effect(setting, value, f"the source {DOCSTRINGS!r}")


def _docstring_rows(max_source_characters: int) -> ReadRows:
    pairs: Iterator[dict[str, str]] = stdlib_pairs(max_source_characters)
    for number, pair in enumerate(pairs, start=1):
        yield make_row(f"row {number} of {DOCSTRINGS!r}", dict(pair))


def _held_out_source(settings: DataSection, path: str | None, cache: Path) -> WeightedSource | None:
    """Return the single source with its split to hold out, if there is one."""
    source = settings.all_sources[0]
    split = settings.validation_split
    if split is None:
        split = _own_split(source, path, cache)
    elif split == (source.split or TRAIN):
        raise DataError(
            f"data.validation_split {split!r} is the split that is trained on; name another"
        )
    return None if split is None else source.model_copy(update={"split": split})


def _own_split(source: WeightedSource, path: str | None, cache: Path) -> str | None:
    """Return the split of a local source that is to be held out, if it has one."""
    if source.source == DOCSTRINGS:
        return None
    cache.mkdir(parents=True, exist_ok=True)
    location = _locate(source.source, path, cache)
    if not local_path(location).exists():
        return None
    names = split_names(source, location)
    if not names:
        return None
    trained_on = source.split or choose_split(names, None, location)
    return validation_name(names, trained_on)


def _load_other_source(
    settings: DataSection, name: str, path: str | None, cache: Path
) -> SourceRows:
    """Load the validation source; the encoding and delimiter of a single source apply to it."""
    source = WeightedSource(source=name)
    if name != DOCSTRINGS:
        cache.mkdir(parents=True, exist_ok=True)
        location = _locate(name, path, cache)
        if local_path(location).exists() or is_pattern(location):
            changes = effective_text_settings(settings, location)
            changes["split"] = validation_name(split_names(source, location), TRAIN)
            source = source.model_copy(update=changes)
    return load_source(
        source,
        path=path,
        cache=cache,
        settings=settings,
        split_setting="validation_source",
    )
