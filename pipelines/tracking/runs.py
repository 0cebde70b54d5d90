"""Runs of an MLflow experiment, whoever logs them: how they are found again, and how long a server is waited for.

Three kinds lie in one experiment, and each is known by a tag of its own: a comparison (`lora.comparison`), one of its models
(`lora.stage`, under the comparison's run), and a training while it goes on (`lora.training`, the key of its stage).
"""

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from pipelines.paths import tracking_uri

SQLITE = "sqlite:///"
MAX_METRICS = 1000
"""What a tracking server takes in one request."""
TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow shows runs and their metrics, not chats."""
PARENT_TAG, STAGE_TAG, TRAINING_TAG = "lora.comparison", "lora.stage", "lora.training"
MANNERS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""How long MLflow waits for a server, and that it draws nothing into our progress."""
Point = tuple[str, float, int, int]
"""A metric's name, value, time (milliseconds since 1970) and step."""


def configure_mlflow_client() -> None:
    """Have MLflow wait and talk no more than we do."""
    for name, value in MANNERS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def make_store(uri: str) -> None:
    """Make MLflow's SQLite file where it is missing, whole or not at all.

    One who is killed while the tables are made would leave a file that nobody can use any more.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        aside = Path(folder) / path.name
        MlflowClient(f"{SQLITE}{aside}").search_experiments(max_results=1)
        with suppress(FileExistsError):  # another was quicker
            os.link(aside, path)


def experiment_id(client: MlflowClient, name: str, runs: Path) -> str:
    """Return the experiment of a name, made where there is none."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # a server says itself where artefacts go; MLflow's own default for a file is relative to where a command runs
    local = (
        (runs / "mlartifacts" / name).resolve().as_uri()
        if tracking_uri(runs).startswith("sqlite:")
        else None
    )
    return str(client.create_experiment(name, artifact_location=local, tags=TRAINING_PAGES))


def find_run(client: MlflowClient, experiment: str, tags: dict[str, str]) -> Run | None:
    """Return the run that bears the tags; None where there is none."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment], query, max_results=1)
    return found[0] if found else None


def run_of(
    client: MlflowClient, experiment: str, name: str, tags: dict[str, str], began: int | None = None
) -> Run:
    """Return the run that bears the tags, or make it; `began` is its start in milliseconds since 1970."""
    found = find_run(client, experiment, tags)
    return (
        found
        if found is not None
        else client.create_run(experiment, start_time=began, tags=tags, run_name=name)
    )


def log_points(client: MlflowClient, run_id: str, points: Iterable[Point]) -> None:
    """Log points in as few requests as the server takes; one that is logged again stays one."""
    metrics = [Metric(*point) for point in points]
    for start in range(0, len(metrics), MAX_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])


def reason_of(error: Exception) -> str:
    """Return what an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
