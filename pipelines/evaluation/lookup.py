"""Where the files that a recipe's evaluation names are looked for: beside the recipe, then where the command ran."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.recipe import local_path

FOLDERS = ("recipe", "here")
"""Names under which a stage's paths may hold the recipe's folder and the folder in which the command ran."""


def folders(paths: Mapping[str, str]) -> list[Path]:
    """Return where relative names are looked for; the working folder where the stage says nothing."""
    named = [Path(paths[name]) for name in FOLDERS if name in paths]
    return list(dict.fromkeys(named)) or [Path.cwd()]


def find(name: str, places: Sequence[Path]) -> Path | None:
    """Return the first file or folder of that name; an absolute one stands for itself."""
    candidates = [place / local_path(name) for place in places]
    return next((path for path in candidates if path.exists()), None)


def listed(places: Sequence[Path]) -> str:
    """Return the folders in words, for an error."""
    return " or ".join(map(str, places))
