"""Where runs are stored, and where files that a recipe names are found. Imports no torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.config.recipe import local_path

FOLDERS = ("recipe", "here")
"""Keys of a stage's paths for the recipe's folder and the working folder of the command."""


def runs_root() -> Path:
    """Return the folder of all runs: LORA_RUNS, or `runs` in the working folder."""
    return Path(os.environ.get("LORA_RUNS", "runs")).resolve()


def tracking_uri(runs: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or a SQLite file in the folder of runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"


def folders(paths: Mapping[str, str]) -> list[Path]:
    """Return the search folders of relative names; the working folder if the stage has none."""
    named = [Path(paths[name]) for name in FOLDERS if name in paths]
    return list(dict.fromkeys(named)) or [Path.cwd()]


def find(name: str, search_folders: Sequence[Path]) -> Path | None:
    """Return the first file or folder of that name; an absolute name is not searched for."""
    for folder in search_folders:
        path = folder / local_path(name)
        if path.exists():
            return path
    return None


def listed(search_folders: Sequence[Path]) -> str:
    """Return the folders as text, for an error."""
    return " or ".join(map(str, search_folders))


def evaluation_files(section: Mapping[str, Any], search_folders: Sequence[Path]) -> dict[str, Path]:
    """Return the files and folders of a recipe's evaluation section by name.

    Their content affects the scores.

    A metric given by import path counts as its module's file, or as the complete top-level package;
    further imports of that module are not followed.
    """
    names = [*section["probes"], *section["execute"]]
    for metric in section["metrics"]:
        if ":" in metric:
            module = metric.partition(":")[0].partition(".")[0]
            names += [f"{module}.py", module]
    task_folder = (section["lm_eval"] or {}).get("include_path")
    if task_folder:
        names.append(task_folder)
    files = {}
    for name in names:
        path = find(name, search_folders)
        if path is not None:
            files[name] = path
    return files
