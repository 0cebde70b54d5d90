"""Where runs are stored, and where files that a recipe names are found. Imports no torch."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.config.recipe import local_path
from pipelines.config.sections import EvaluationSection


def runs_root() -> Path:
    """Return the folder of all runs: LORA_RUNS, or `runs` in the working folder."""
    return Path(os.environ.get("LORA_RUNS", "runs")).resolve()


def tracking_uri(runs: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or a SQLite file in the folder of runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"


def tracking_account() -> dict[str, str]:
    """Return MLflow's variables with the account of MLFLOW_TRACKING_URI apart from the address.

    Errors and processes then have the address without the password. A database keeps it, because
    its clients have no such variables. Empty if the address has no account.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    parts = urlsplit(uri)
    account, at, host = parts.netloc.rpartition("@")
    if not at or parts.scheme not in ("http", "https"):
        return {}
    user, _, password = account.partition(":")
    return {
        "MLFLOW_TRACKING_URI": parts._replace(netloc=host).geturl(),
        "MLFLOW_TRACKING_USERNAME": unquote(user),
        "MLFLOW_TRACKING_PASSWORD": unquote(password),
    }


def folders(*named: str | None) -> list[Path]:
    """Return the search folders of relative names; the working folder if none is given."""
    given = [Path(name) for name in named if name is not None]
    return list(dict.fromkeys(given)) or [Path.cwd()]


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


def evaluation_files(section: EvaluationSection, search_folders: Sequence[Path]) -> dict[str, Path]:
    """Return the files and folders of a recipe's evaluation section by name.

    Their content affects the scores.

    A metric given by import path counts as its module's file, or as the complete top-level package;
    further imports of that module are not followed.
    """
    names = [*section.probes, *section.execute]
    for metric in section.metrics:
        if ":" in metric:
            module = metric.partition(":")[0].partition(".")[0]
            names += [f"{module}.py", module]
    if section.lm_eval is not None and section.lm_eval.include_path:
        names.append(section.lm_eval.include_path)
    files = {}
    for name in names:
        path = find(name, search_folders)
        if path is not None:
            files[name] = path
    return files
