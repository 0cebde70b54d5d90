"""The runs of an MLflow experiment: client settings, lookup by tag, and logging of points.

An experiment has three kinds of runs, each with its own tag: a comparison (`lora.comparison`), one
of its models (`lora.stage`, a child of the comparison's run), and a training in progress
(`lora.training`, the key of its stage).
"""

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from pipelines.errors import RegistryError
from pipelines.paths import tracking_uri
from pipelines.tracking.step_metrics import MetricPoint

SQLITE = "sqlite:///"
MAX_METRICS = 1000
"""The most metrics that a tracking server accepts in one request."""
TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow shows runs and their metrics, not chats."""
PARENT_TAG = "lora.comparison"
STAGE_TAG = "lora.stage"
TRAINING_TAG = "lora.training"
KIND_TAG = "lora.kind"
ADAPTER = "adapter"
"""The kind of an adapter's run; the others are comparison, base, control and training."""
CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""How long MLflow waits for a server, no second progress bar within ours, and no address of a page
for chats."""


def configure_mlflow_client() -> None:
    """Set MLflow's timeouts and silence its log, unless the environment sets them."""
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def ensure_store(uri: str) -> None:
    """Create MLflow's SQLite file if it is missing, atomically.

    A process that is killed while MLflow creates the tables would leave an unusable file.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        MlflowClient(f"{SQLITE}{temporary}").search_experiments(max_results=1)
        with suppress(FileExistsError):  # another process was faster
            os.link(temporary, path)


def experiment_id(client: MlflowClient, name: str, runs: Path) -> str:
    """Return the id of the experiment of this name; create it if it does not exist."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    artifacts = None  # a server decides by itself where artifacts are stored
    if tracking_uri(runs).startswith("sqlite:"):
        # MLflow's own default for a file is relative to the working directory
        artifacts = artifact_folder(runs, name).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=artifacts, tags=TRAINING_PAGES))
    except MlflowException:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)  # another process was faster


def artifact_folder(runs: Path, experiment: str) -> Path:
    """Return the folder of an experiment's artifacts; raise RegistryError if it is elsewhere."""
    parent = (runs / "mlartifacts").resolve()
    folder = (parent / experiment).resolve()
    if parent not in folder.parents:
        raise RegistryError(
            f"the experiment {experiment!r} would have its artifacts in {folder}, outside "
            f"{parent}; give registry.experiment a name without '..' and without a leading '/'"
        )
    return folder


def find_run(client: MlflowClient, experiment: str, tags: dict[str, str]) -> Run | None:
    """Return the newest run with these tags; None if there is none."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment], query, max_results=1)
    return found[0] if found else None


def find_or_create_run(
    client: MlflowClient,
    experiment: str,
    name: str,
    tags: dict[str, str],
    started: int | None = None,
) -> Run:
    """Return the run with these tags, or create it.

    Args:
        client: of the tracking server.
        experiment: id of the experiment.
        name: name of a new run.
        tags: identify the run.
        started: start of a new run in milliseconds since 1970; now if None.
    """
    run = find_run(client, experiment, tags)
    if run is not None:
        return run
    return client.create_run(experiment, start_time=started, tags=tags, run_name=name)


def log_points(client: MlflowClient, run_id: str, points: Iterable[MetricPoint]) -> None:
    """Log points in as few requests as possible; logging a point again does not duplicate it."""
    metrics = [Metric(*point) for point in points]
    for start in range(0, len(metrics), MAX_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])
