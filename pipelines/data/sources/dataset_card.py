"""Configurations of a data set folder, read from the front matter of its README.md.

A clone of a hub data set lists its configurations there, each with the files of its splits:

    ---
    configs:
    - config_name: main
      data_files:
      - split: train
        path: main/train-*.parquet
    ---
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.data.sources.split_names import TRAIN, listed_names
from pipelines.errors import DataError, one_line

CARD = "README.md"
FRONT_MATTER_MARK = "---"
"""Line before and after the front matter."""


@dataclass(frozen=True)
class CardConfig:
    """One configuration of a data set folder."""

    name: str
    is_default: bool
    folder: str
    """Within the data set folder."""
    patterns: dict[str, tuple[str, ...]]
    """Split → patterns of its files; empty if the names of files indicate the splits."""


def read_configs(folder: Path) -> list[CardConfig]:
    """Return the configurations that the folder's card lists; none if there is no card.

    Args:
        folder: of a data set.

    Raises:
        DataError: the card's front matter is not valid, or a configuration lacks a key.
    """
    card = folder / CARD
    if not card.is_file():
        return []
    try:
        text = card.read_text(encoding="utf-8-sig")
        values = yaml.safe_load(_front_matter(text))
        listed = values.get("configs") if isinstance(values, dict) else None
        if isinstance(listed, dict):
            listed = [listed]
        return [_config(one) for one in listed or []]
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(
            f"{str(card)!r} does not describe its configurations in valid YAML: {one_line(error)}; "
            "fix its first section, or remove the file"
        ) from error


def choose_config(configs: list[CardConfig], wanted: str | None, folder: Path) -> CardConfig:
    """Return the configuration of that name; by default the default or the only one.

    Args:
        configs: at least one.
        wanted: data.config of the recipe, if it has one.
        folder: of the data set, in messages.

    Raises:
        DataError: there is none, with the available names.
    """
    by_name = {config.name: config for config in configs}
    available = listed_names(by_name)
    if wanted is None:
        defaults = [config for config in configs if config.is_default]
        candidates = defaults or configs
        if len(candidates) == 1:
            return candidates[0]
        raise DataError(
            f"data source {str(folder)!r} has the configurations {available}; name one as "
            "data.config"
        )
    if wanted not in by_name:
        raise DataError(
            f"data.config {wanted!r} is not a configuration of {str(folder)!r}, which has "
            f"{available}; name one of them"
        )
    return by_name[wanted]


def _front_matter(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines()]
    if lines.count(FRONT_MATTER_MARK) < 2 or lines[0] != FRONT_MATTER_MARK:
        return ""
    end = lines.index(FRONT_MATTER_MARK, 1)
    return "\n".join(lines[1:end])


def _config(values: dict[str, Any]) -> CardConfig:
    name = str(values.get("config_name", "default"))
    return CardConfig(
        name=name,
        is_default=name == "default" or values.get("default") is True,
        folder=str(values.get("data_dir") or ""),
        patterns=_patterns(values.get("data_files")),
    )


def _patterns(data_files: Any) -> dict[str, tuple[str, ...]]:
    """Return split → patterns, from any of the forms that a card can have."""
    if data_files is None:
        return {}
    if isinstance(data_files, dict):
        return {str(split): _as_tuple(paths) for split, paths in data_files.items()}
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        split = TRAIN
        paths = entry
        if isinstance(entry, dict):
            split = str(entry["split"])
            paths = entry["path"]
        patterns[split] = patterns.get(split, ()) + _as_tuple(paths)
    return patterns


def _as_tuple(paths: Any) -> tuple[str, ...]:
    return tuple(map(str, paths)) if isinstance(paths, list) else (str(paths),)
