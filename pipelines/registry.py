"""MLflow: the runs that everyone compares, and the registered model whose aliases everyone pulls.

One parent run for a comparison, with a child for the base, the base in 4 bits, the control and each rank. Each adapter
is a version of one registered model; its bytes are the adapter's alone. Everything here can be repeated: runs and
versions are looked up by digest before they are made, and aliases move last.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from pipelines.errors import RegistryError
from pipelines.places import tracking_uri
from pipelines.stage import read_records

MAX_ADAPTER_SHARE = 0.5
"""An artefact larger than this share of the base's weights in 2 bytes is no adapter."""
PARENT_TAG, STAGE_TAG, ADAPTER_TAG = "lora.comparison", "lora.stage", "adapter_sha256"
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}


def register(summary: dict[str, Any], runs: Path, files: list[Path]) -> dict[str, Any]:
    """Log a comparison and register its adapters; return run ids, versions and aliases.

    Args:
        summary: see `pipelines.comparison`, with `name`, `key`, `base` and `data` beside it.
        runs: folder of all runs; holds the SQLite file unless a server is named.
        files: report and summary, logged with the parent run.

    Raises:
        RegistryError: the server does not answer or refuses; calling again goes on where it stopped.
    """
    with _answering(runs) as client:
        experiment = _experiment(client, summary["recipe"]["registry"]["experiment"] or summary["name"], runs)
        parent = _run(client, experiment, summary["name"], {PARENT_TAG: summary["key"]})
        client.set_tag(parent.info.run_id, "lora.decision", summary["decision"])
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
    return str(client.create_experiment(name, artifact_location=local))


def _run(client: MlflowClient, experiment: str, name: str, tags: dict[str, str]) -> Run:
    """Return the run that bears the tags, or make it."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment], query, max_results=1)
    return found[0] if found else client.create_run(experiment, tags=tags, run_name=name)


def _child(client: MlflowClient, experiment: str, parent: Run, summary: dict[str, Any], label: str) -> str:
    """Log one model's parameters, figures, training curve and files; return the run's id."""
    model = summary["models"][label]
    tags = {"mlflow.parentRunId": parent.info.run_id, STAGE_TAG: f"{summary['key'][:12]}/{label}"}
    run = _run(client, experiment, label, tags)
    run_id = str(run.info.run_id)
    if run.info.status == "FINISHED":
        return run_id
    figures = {name: value for name, value in _figures(model).items() if value is not None}
    client.log_batch(
        run_id,
        metrics=[Metric(name, float(value), 0, 0) for name, value in figures.items()],
        params=[] if run.data.params else [Param(name, value) for name, value in _params(summary, label).items()],
        tags=[RunTag("verdict", model["verdict"]["status"]), RunTag("reason", model["verdict"]["reason"])] if "verdict" in model else [],
    )
    if "folder" in model:
        client.log_batch(run_id, metrics=list(_curve(Path(model["folder"]) / "metrics.jsonl")))
    client.log_artifact(run_id, summary["items"][label])
    if "verdict" in model:
        client.log_artifacts(run_id, str(Path(model["folder"]) / "adapter"), "adapter")
    client.set_terminated(run_id)
    return run_id


def _params(summary: dict[str, Any], label: str) -> dict[str, str]:
    """Return the few parameters that vary between the runs of a comparison."""
    recipe, model = summary["recipe"], summary["models"][label]
    if label.startswith("base"):
        return {"method": "none", "quantization": "none" if label == "base" else recipe["base_model"]["quantization"]}
    if model["rank"] is None:
        return {"method": "full", "quantization": "none", "learning_rate": f"{recipe['control']['learning_rate']:g}"}
    lora = recipe["lora"]
    return {
        "method": "lora",
        "quantization": recipe["base_model"]["quantization"],
        "learning_rate": f"{lora['learning_rate']:g}",
        "lora.r": str(model["rank"]),
        "lora.alpha": f"{lora['alpha']:g}",
    }


def _figures(model: dict[str, Any]) -> dict[str, float | None]:
    """Flatten a model's figures under the prefixes that group them on MLflow's pages."""
    scores = model["scores"]
    named = ("task_loss", "chrf", "rouge_l", "choice_probability", "accuracy", "margin")
    flat: dict[str, float | None] = {f"final/{name}": scores[name] for name in named}
    flat |= {f"general/{name}": values["choice_probability"] for name, values in scores["benchmarks"].items()}
    for effect in ("change", "total"):
        for figure in ("task_gain", "choice_probability"):
            if effect in model:
                flat |= {
                    f"{effect}/{figure}" + end: model[effect][figure][key]
                    for end, key in (("", "mean"), ("_low", "low"), ("_high", "high"))
                }
    training = model.get("figures", {})
    flat |= {f"cost/{name}": training.get(name) for name in ("trained_weights", "file_bytes", "tokens_per_second", "peak_memory_bytes")}
    return flat


def _curve(path: Path) -> Iterator[Metric]:
    for row in read_records(path):
        for name in ("loss", "learning_rate", "grad_norm"):
            if row[name] is not None:
                yield Metric(f"train/{name}", float(row[name]), int(1000 * row["time"]), row["step"])


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
    return int(client.create_model_version(name, source, run_id, tags=_version_tags(summary, label)).version)


def _version_tags(summary: dict[str, Any], label: str) -> dict[str, str]:
    """Return what a consumer wants to know of an adapter without fetching it."""
    model, base = summary["models"][label], summary["base"]
    values = {
        ADAPTER_TAG: model["figures"]["adapter_sha256"],
        "rank": model["rank"],
        "verdict": model["verdict"]["status"],
        "reason": model["verdict"]["reason"],
        "task_gain": model["total"]["task_gain"]["mean"],
        "general_change": model["change"]["choice_probability"]["mean"],
        "base": base["id"],
        "base_revision": base["revision"],
        "quantization": summary["recipe"]["base_model"]["quantization"],
        "data_digest": summary["data"]["digest"],
        "tokenizer_sha256": base["tokenizer_sha256"],
        "template_sha256": base["template_sha256"],
        "training_stage": model["key"],
        "comparison": summary["key"],
        "commit": summary["commit"],
        **{f"base_fingerprint.{kind}": value for kind, value in base["digests"].items()},
    }
    return {key: str(value)[:5000] for key, value in values.items()}


def _refuse_a_base(adapter: Path, base_weights: int) -> None:
    size = sum(path.stat().st_size for path in adapter.iterdir())
    limit = MAX_ADAPTER_SHARE * 2 * base_weights
    if size > limit:
        raise RegistryError(f"{adapter} holds {size:,} bytes, near the size of a base ({limit:,.0f} is the limit); lower the rank")
