"""MLflow: the runs that everyone compares, and the registered model whose aliases everyone pulls.

One parent run for a comparison, with a child for the base, the base in 4 bits, the control and each rank. Each adapter
is a version of one registered model; its bytes are the adapter's alone. Everything here can be repeated: runs and
versions are looked up by digest before they are made, and aliases move last.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from pipelines.errors import RegistryError
from pipelines.places import tracking_uri
from pipelines.reporting import logged

MAX_ADAPTER_SHARE = 0.5
"""An artefact larger than this share of the base's weights in 2 bytes is no adapter."""
MAX_METRICS = 1000
"""What a tracking server takes in one request."""
TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow shows runs and their metrics, not chats."""
PARENT_TAG, STAGE_TAG, ADAPTER_TAG = "lora.comparison", "lora.stage", "adapter_sha256"
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}


def register(summary: dict[str, Any], runs: Path, files: list[Path], note: str) -> dict[str, Any]:
    """Log a comparison and register its adapters; return run ids, versions and aliases.

    Args:
        summary: see `pipelines.judging.comparison`, with `name`, `key`, `base` and `data` beside it.
        runs: folder of all runs; holds the SQLite file unless a server is named.
        files: report and summary, logged with the parent run.
        note: Markdown, shown on the parent run's page.

    Raises:
        RegistryError: the server does not answer or refuses; calling again goes on where it stopped.
    """
    with _answering(runs) as client:
        experiment = _experiment(client, summary["recipe"]["registry"]["experiment"] or summary["name"], runs)
        parent = _parent(client, experiment, summary, note)
        for file in files:
            client.log_artifact(parent.info.run_id, str(file))
        children = {label: _child(client, experiment, parent, summary, label) for label in summary["models"]}
        versions = {
            label: _version(client, summary, label, children[label]) for label, model in summary["models"].items() if "verdict" in model
        }
        client.set_terminated(parent.info.run_id)
        name = summary["recipe"]["registry"]["model"]
        aliases = {alias: versions[summary[alias]] for alias in ("candidate", "champion") if summary[alias] is not None}
        for alias, version in aliases.items():  # last: consumers read nothing but these
            client.set_registered_model_alias(name, alias, str(version))
    return {
        "tracking_uri": tracking_uri(runs),
        "experiment_id": experiment,
        "parent_run": parent.info.run_id,
        "runs": children,
        "model": name,
        "versions": versions,
        "aliases": aliases,
    }


def download(uri: str, runs: Path, destination: Path) -> Path:
    """Fetch a registered adapter, `models:/NAME@ALIAS` or `models:/NAME/VERSION`, into `destination`."""
    with _answering(runs):
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(destination)))


@contextmanager
def _answering(runs: Path) -> Iterator[MlflowClient]:
    """Yield a client, and turn MLflow's errors into one sentence that says nothing is lost."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = tracking_uri(runs)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield MlflowClient()
    except (MlflowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise RegistryError(f"MLflow at {uri}: {reason}; the adapters are kept, and the next run of the recipe registers them") from error


def _experiment(client: MlflowClient, name: str, runs: Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # a server says itself where artefacts go; MLflow's own default for a file is relative to where a command runs
    local = (runs / "mlartifacts" / name).resolve().as_uri() if tracking_uri(runs).startswith("sqlite:") else None
    return str(client.create_experiment(name, artifact_location=local, tags=TRAINING_PAGES))


def _run(client: MlflowClient, experiment: str, name: str, tags: dict[str, str], began: int | None = None) -> Run:
    """Return the run that bears the tags, or make it; `began` is its start in milliseconds since 1970."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment], query, max_results=1)
    return found[0] if found else client.create_run(experiment, start_time=began, tags=tags, run_name=name)


def _parent(client: MlflowClient, experiment: str, summary: dict[str, Any], note: str) -> Run:
    """Make the comparison's own run, or find it."""
    run = _run(client, experiment, summary["name"], {PARENT_TAG: summary["key"]}, int(1000 * (time.time() - summary["seconds"])))
    run_id = run.info.run_id
    tags = {"lora.decision": summary["decision"], "mlflow.note.content": note}
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in {**tags, **_source(summary)}.items()])
    return run


def _child(client: MlflowClient, experiment: str, parent: Run, summary: dict[str, Any], label: str) -> str:
    """Log one model's parameters, figures, training curve, data and files; return the run's id."""
    model = summary["models"][label]
    began, ended = logged.training_time(model) or (None, None)
    tags = {"mlflow.parentRunId": parent.info.run_id, STAGE_TAG: f"{summary['key'][:12]}/{label}"}
    run = _run(client, experiment, label, tags, began)
    run_id = str(run.info.run_id)
    if run.info.status == "FINISHED":
        return run_id
    verdict = {key: model["verdict"][value] for key, value in (("verdict", "status"), ("reason", "reason")) if "verdict" in model}
    client.log_batch(
        run_id,
        params=[] if run.data.params else [Param(name, value) for name, value in logged.parameters(summary, label).items()],
        tags=[RunTag(key, value) for key, value in {**verdict, **_source(summary)}.items()],
    )
    metrics = [Metric(name, value, ended or 0, 0) for name, value in logged.metrics(model).items()]
    metrics += [Metric(*point) for point in logged.curve(model)]
    for start in range(0, len(metrics), MAX_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])
    if "folder" in model:
        client.log_inputs(run_id, [DatasetInput(_dataset(summary))])
    client.log_artifact(run_id, summary["items"][label])
    if "verdict" in model:
        client.log_artifacts(run_id, str(Path(model["folder"]) / "adapter"), "adapter")
    client.set_terminated(run_id, end_time=ended)
    return run_id


def _source(summary: dict[str, Any]) -> dict[str, str]:
    """Return the tags by which MLflow names the code that made a run."""
    return {"mlflow.source.name": f"lora run {summary['name']}", "mlflow.source.git.commit": summary["commit"]}


def _dataset(summary: dict[str, Any]) -> Dataset:
    """Name the training data by its digest, of which MLflow takes 36 characters."""
    source = summary["recipe"]["data"]["source"]
    profile = {name: summary["data"][name] for name in ("train_examples", "train_tokens", "supervised_tokens")}
    return Dataset(Path(source).name, summary["data"]["digest"][:36], "local", json.dumps({"source": source}), profile=json.dumps(profile))


def _version(client: MlflowClient, summary: dict[str, Any], label: str, run_id: str) -> int:
    """Register an adapter unless its very bytes are registered already; return the version."""
    model, name = summary["models"][label], summary["recipe"]["registry"]["model"]
    sha256 = model["figures"]["adapter_sha256"]
    _refuse_a_base(Path(model["folder"]) / "adapter", summary["base"]["weights"])
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=f"LoRA adapters of the recipe {summary['name']}")
    for known in client.search_model_versions(f"name = '{name}'"):
        if known.tags.get(ADAPTER_TAG) == sha256:
            return int(known.version)
    source = f"{client.get_run(run_id).info.artifact_uri}/adapter"
    return int(client.create_model_version(name, source, run_id, tags=logged.version_tags(summary, label)).version)


def _refuse_a_base(adapter: Path, base_weights: int) -> None:
    size = sum(path.stat().st_size for path in adapter.iterdir())
    limit = MAX_ADAPTER_SHARE * 2 * base_weights
    if size > limit:
        raise RegistryError(f"{adapter} holds {size:,} bytes, near the size of a base ({limit:,.0f} is the limit); lower the rank")
