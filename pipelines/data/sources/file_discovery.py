"""Find the files of a local source: a file, a folder, or a pattern. Imports no torch.

file_formats.py   what a file's suffix means
split_names.py    which split a file belongs to
dataset_card.py   configurations of a cloned data set
"""

import glob
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines.config.data_section import SourceSettings, WeightedSource
from pipelines.config.recipe import local_path
from pipelines.data.sources.dataset_card import CARD, CardConfig, choose_config, read_configs
from pipelines.data.sources.file_formats import (
    COMPRESSIONS,
    KNOWN_SUFFIXES,
    DataFile,
    format_of,
    uncompressed_name,
)
from pipelines.data.sources.split_names import TRAIN, split_in_name
from pipelines.errors import DataError

IGNORED_STEMS = {"README", "LICENSE", "LICENCE", "NOTICE", "CITATION", "CHANGELOG"}
IGNORED_NAMES = {"dataset_infos.json", "dataset_info.json"}
SAVED_DICT = "dataset_dict.json"
SAVED_DATASET = ("dataset_info.json", "state.json")

Splits = dict[str, tuple[DataFile, ...]]


@dataclass(frozen=True)
class FoundFiles:
    """The data files of a local source."""

    splits: Splits
    """Split → its files; `train` alone if nothing names splits."""
    has_names: bool
    """Whether names of files or a card name the splits."""
    card: Path | None = None
    """The card that lists the files, if one does."""


def is_remote(source: str) -> bool:
    """Return whether the source is an address such as s3://bucket/rows.jsonl."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def is_pattern(source: str) -> bool:
    """Return whether the source is a pattern of files, such as data/*.jsonl."""
    return not is_remote(source) and glob.has_magic(source) and not local_path(source).exists()


def is_saved(path: Path) -> bool:
    """Return whether `save_to_disk` wrote the folder."""
    if (path / SAVED_DICT).is_file():
        return True
    return all((path / name).is_file() for name in SAVED_DATASET)


def local_files(source: WeightedSource, path: str) -> list[Path]:
    """Return all files on which the rows of a local source depend, of every split.

    Args:
        source: its settings.
        path: where the file, the folder or the pattern was found.
    """
    folder = local_path(path)
    if is_saved(folder):
        return sorted(file for file in folder.rglob("*") if file.is_file())
    found = find_files(source, path)
    files = set[Path]()
    for split in found.splits.values():
        files.update(file.path for file in split)
    if found.card is not None:
        files.add(found.card)
    return sorted(files)


def find_files(source: SourceSettings, path: str) -> FoundFiles:
    """Return the data files of a file, a folder or a pattern.

    Args:
        source: its settings, of which only the configuration is used.
        path: where the file, the folder or the pattern was found.

    Raises:
        DataError: nothing is there, or a file is not a data file.
    """
    local = local_path(path)
    if local.is_dir():
        return _in_folder(local, source.config)
    if source.config is not None:
        raise DataError(
            f"data.config {source.config!r} has no effect on {path!r}, which has no "
            "configurations; remove it"
        )
    if local.is_file():
        if format_of(local) is None:
            raise _unknown([local])
        file = DataFile(local, local.name)
        return FoundFiles({TRAIN: (file,)}, has_names=False)
    if not is_pattern(path):
        raise DataError(
            f"data file {path!r} does not exist; give an absolute path, or one relative to the "
            "recipe or to the working directory"
        )
    files = _data_files(_matches(str(local)), _fixed_folder(local))
    if not files:
        raise DataError(f"no data file matches the pattern {path!r}; check its folder and suffix")
    return FoundFiles({TRAIN: files}, has_names=False)


def _in_folder(folder: Path, config_name: str | None) -> FoundFiles:
    configs = read_configs(folder)
    if not configs:
        if config_name is not None:
            raise DataError(
                f"data.config {config_name!r} has no effect on {str(folder)!r}, whose README.md "
                "lists no configurations; remove it"
            )
        return _by_name(folder, folder)
    config = choose_config(configs, config_name, folder)
    card = folder / CARD
    if not config.patterns:
        found = _by_name(folder / config.folder, folder)
        return FoundFiles(found.splits, found.has_names, card)
    splits: Splits = {}
    for split, patterns in config.patterns.items():
        paths = _listed_files(folder, config, patterns)
        splits[split] = _data_files(paths, folder)
    return FoundFiles(splits, has_names=True, card=card)


def _listed_files(folder: Path, config: CardConfig, patterns: Iterable[str]) -> list[Path]:
    """Return the files that match the patterns of one split, in their order."""
    escaped = Path(glob.escape(str(folder / config.folder)))
    paths = list[Path]()
    for pattern in patterns:
        matches = _matches(str(escaped / pattern))
        if not matches:
            raise DataError(
                f"no file matches {pattern!r}, which {str(folder / CARD)!r} lists for the "
                f"configuration {config.name!r}; complete the folder"
            )
        paths += matches
    return paths


def _by_name(folder: Path, root: Path) -> FoundFiles:
    """Return the files of a folder and its subfolders; their names may name splits."""
    saved = sorted(listing.parent.name for listing in folder.rglob(SAVED_DATASET[1]))
    if saved:
        raise DataError(
            f"data folder {str(folder)!r} has saved data sets in {', '.join(saved[:5])}; name the "
            "folder of one of them"
        )
    files = _data_files(_matches(f"{glob.escape(str(folder))}/**"), root)
    if not files:
        raise DataError(
            f"data folder {str(folder)!r} has no data file; the known suffixes are {KNOWN_SUFFIXES}"
        )
    by_split: dict[str, list[DataFile]] = defaultdict(list)
    unnamed = list[DataFile]()
    for file in files:
        split = split_in_name(file.path.relative_to(folder))
        if split is None:
            unnamed.append(file)
        else:
            by_split[split].append(file)
    if unnamed and TRAIN in by_split:
        raise DataError(
            f"data folder {str(folder)!r} has files of splits ({_names(by_split[TRAIN])}, …) and "
            f"others ({_names(unnamed)}); move the others away, or start their names with "
            "the name of a split"
        )
    if unnamed:
        by_split[TRAIN] = unnamed
    has_names = len(by_split) > 1 or not unnamed
    splits = {name: tuple(found) for name, found in by_split.items()}
    return FoundFiles(splits, has_names)


def _data_files(paths: Iterable[Path], root: Path) -> tuple[DataFile, ...]:
    """Return the data files among paths.

    Raises:
        DataError: a file is unknown, is there with and without compression, or is empty.
    """
    files = []
    unknown = []
    for path in dict.fromkeys(paths):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        if not path.is_file() or _is_ignored(path, name):
            continue
        if format_of(path) is None:
            unknown.append(path)
        else:
            files.append(DataFile(path, name))
    if unknown:
        raise _unknown(unknown)
    _check_no_copies(files)
    return tuple(files)


def _unknown(paths: list[Path]) -> DataError:
    """Return the error for files whose suffix names no format."""
    listed = ", ".join(repr(str(path)) for path in sorted(paths)[:5])
    return DataError(
        f"{listed} cannot be read as rows; use a file that ends in {KNOWN_SUFFIXES}, also followed "
        f"by {', '.join(COMPRESSIONS)}, and move other files out of a data folder"
    )


def _is_ignored(path: Path, name: str) -> bool:
    """Return whether a file describes data instead of holding rows."""
    parts = Path(name).parts
    if any(part.startswith(".") for part in parts if part != ".."):
        return True
    if path.name.startswith("_") and format_of(path) is None:
        return True
    stem, _, _ = path.name.partition(".")
    return path.name in IGNORED_NAMES or stem.upper() in IGNORED_STEMS


def _check_no_copies(files: list[DataFile]) -> None:
    seen: dict[Path, DataFile] = {}
    for file in files:
        plain = file.path.with_name(uncompressed_name(file.path))
        if plain in seen:
            raise DataError(
                f"{str(file.path)!r} and {seen[plain].path.name!r} are the same file with and "
                "without compression, so that its rows would be read twice; remove one"
            )
        seen[plain] = file


def _matches(pattern: str) -> list[Path]:
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - the pattern may be absolute
    return [Path(match) for match in sorted(matches)]


def _fixed_folder(pattern: Path) -> Path:
    """Return the folder of a pattern before its first special character."""
    for parent in pattern.parents:
        if not glob.has_magic(str(parent)):
            return parent
    return Path()


def _names(files: list[DataFile]) -> str:
    return ", ".join(file.name for file in files[:3])
