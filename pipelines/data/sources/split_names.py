"""Names of splits: recognized in the names of files, and chosen by a setting."""

import re
from collections.abc import Iterable
from pathlib import PurePath

from pipelines.errors import DataError

TRAIN = "train"
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval", "test")
"""Names of a split to hold out; the first one that exists is used."""
SPLIT_NAMES = frozenset({TRAIN, *VALIDATION_NAMES})


def split_in_name(relative: PurePath) -> str | None:
    """Return the split that a file's folders or its name indicate.

    A folder indicates it by its complete name; a file by its first or last word, without the
    numbers of shards, such as `train-00000-of-00002.parquet` or `boxes_val.jsonl`.
    """
    for folder in relative.parts[:-1]:
        if folder.lower() in SPLIT_NAMES:
            return folder.lower()
    stem = relative.name.partition(".")[0].lower()
    words: list[str] = re.findall(r"[a-z]+", re.sub(r"-of-\d+", "", stem))
    for word in words[:1] + words[-1:]:
        if word in SPLIT_NAMES:
            return word
    return None


def choose_split(
    names: Iterable[str], wanted: str | None, source: str, *, setting: str = "split"
) -> str:
    """Return the split with the wanted name; by default `train`, or the only one.

    Args:
        names: of the available splits.
        wanted: the user's, if any.
        source: in messages.
        setting: name of the setting that has the split.

    Raises:
        DataError: there is none, with the available names.
    """
    available = list(names)
    if wanted is not None and wanted in available:
        return wanted
    if wanted is None and TRAIN in available:
        return TRAIN
    if wanted is None and len(available) == 1:
        return available[0]
    listed = listed_names(available)
    if wanted is None:
        raise DataError(
            f"data source {source!r} has the splits {listed}, none of which is 'train'; name "
            f"one as data.{setting}"
        )
    hint = ""
    if re.search(r"[\[+]", wanted):
        hint = " (parts of a split can be named only for a saved or a hub data set; data.max_rows "
        hint += "limits the number of rows)"
    raise DataError(
        f"data.{setting} {wanted!r} is not a split of {source!r}, which has {listed}; name one "
        f"of them{hint}"
    )


def validation_name(names: Iterable[str], trained_on: str) -> str | None:
    """Return the split to hold out, if there is one.

    Args:
        names: the available splits.
        trained_on: the split of the training rows, or parts of splits; these are not held out.
    """
    available = set(names) - set(re.findall(r"\w+", trained_on))
    for name in VALIDATION_NAMES:
        if name in available:
            return name
    return None


def listed_names(names: Iterable[str]) -> str:
    """Return names as text for an error message, in a fixed order."""
    return ", ".join(sorted(names))
