"""Where things are kept: the folder of all runs, and the store that MLflow's pages read."""

import os
from pathlib import Path


def runs_root() -> Path:
    """Return the folder of all runs: LORA_RUNS, or `runs` where the command was started."""
    return Path(os.environ.get("LORA_RUNS", "runs")).resolve()


def tracking_uri(runs: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or a SQLite file beside the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"
