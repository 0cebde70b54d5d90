"""Where things are kept, and where the files that a recipe names are found. Imports no torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.config.recipe import local_path

FOLDERS = ("recipe", "here")
"""Names under which a stage's paths may hold the recipe's folder and the folder in which the command ran."""


def runs_root() -> Path:
    """Return the folder of all runs: LORA_RUNS, or `runs` where the command was started."""
    return Path(os.environ.get("LORA_RUNS", "runs")).resolve()


def tracking_uri(runs: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or a SQLite file beside the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"


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


def evaluation_files(section: Mapping[str, Any], places: Sequence[Path]) -> dict[str, Path]:
    """Return the files and folders that a recipe's evaluation section names, by name: what is in them decides what is scored.

    Of a metric by import path it is the module's own file, or the whole package that holds it; what else a module imports
    is not looked for.
    """
    modules = [
        name.partition(":")[0].partition(".")[0] for name in section["metrics"] if ":" in name
    ]
    tasks = (section["lm_eval"] or {}).get("include_path")
    names = [
        *section["probes"],
        *(f"{module}.py" for module in modules),
        *modules,
        *section["execute"],
        *([tasks] if tasks else []),
    ]
    found = {name: find(name, places) for name in names}
    return {name: path for name, path in found.items() if path is not None}
