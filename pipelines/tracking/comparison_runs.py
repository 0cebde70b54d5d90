"""The MLflow runs of a comparison: a parent run with its tables, and a child run per model.

Everything here can be repeated: a run is looked up by its tags before it is created.
"""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Param, Run, RunTag

from pipelines.comparison.document import ModelSummary, Summary
from pipelines.reporting import page_sections
from pipelines.reporting.model_parts import training_of
from pipelines.tracking import logged, model_card
from pipelines.tracking.logged import Tags
from pipelines.tracking.runs import (
    PARENT_TAG,
    STAGE_TAG,
    TRAINING_TAG,
    find_or_create_run,
    find_run,
    log_points,
)
from pipelines.tracking.step_metrics import MetricPoint
from pipelines.tracking.tables import tables

TRAINING_RUN_TAG = "lora.training_run"
TABLES_TAG = "mlflow.loggedArtifacts"
NOTE_TAG = "mlflow.note.content"
MAX_DIGEST = 36
"""Characters of a data set's digest that MLflow accepts."""


def log_comparison(client: MlflowClient, experiment: str, summary: Summary) -> Run:
    """Find or create the comparison's own run; log its tables, and the recipe that repeats it."""
    started = int(1000 * (time.time() - summary.seconds))
    tags = {PARENT_TAG: summary.key}
    run = find_or_create_run(client, experiment, summary.name, tags, started)
    run_id = run.info.run_id
    shown = []
    for name, table in tables(summary).items():
        # log_table would append the rows again when it is called again
        client.log_dict(run_id, asdict(table), name)
        shown.append({"path": name, "type": "table"})
    client.log_text(run_id, page_sections.recipe_text(summary), page_sections.RECIPE)
    values = {"lora.decision": summary.decision, TABLES_TAG: json.dumps(shown)}
    client.log_batch(run_id, tags=_run_tags(values | _source_tags(summary)))
    return run


def log_documents(client: MlflowClient, run_id: str, files: list[Path], note: str) -> None:
    """Log the report, the summary and the note of a comparison with its own run."""
    for file in files:
        client.log_artifact(run_id, str(file))
    client.set_tag(run_id, NOTE_TAG, note)


def log_model(
    client: MlflowClient, experiment: str, parent: Run, *, summary: Summary, label: str
) -> str:
    """Log a model's parameters, metrics, training curve, data and files; return the run's id."""
    model = summary.models[label]
    started, ended = logged.training_time(model) or (None, None)
    comparison = summary.key[:12]
    tags = {
        "mlflow.parentRunId": parent.info.run_id,
        STAGE_TAG: f"{comparison}/{label}",
    }
    run = find_or_create_run(client, experiment, label, tags, started)
    run_id = str(run.info.run_id)
    if run.info.status == "FINISHED":
        return run_id
    values = logged.run_tags(summary, label) | _source_tags(summary)
    values |= _link_training(client, experiment, model, ended)
    params = []
    if not run.data.params:
        for name, value in logged.parameters(summary, label).by_name().items():
            params.append(Param(name, value))
    client.log_batch(run_id, params=params, tags=_run_tags(values))
    points: list[MetricPoint] = []
    for name, metric in logged.metrics(model).items():
        points.append((name, metric, ended or 0, 0))
    log_points(client, run_id, points)
    log_points(client, run_id, logged.curve(model))
    _log_files(client, run_id, summary, label)
    client.set_terminated(run_id, end_time=ended)
    return run_id


def _log_files(client: MlflowClient, run_id: str, summary: Summary, label: str) -> None:
    """Log training data and item records, and the files of an adapter with its card."""
    model = summary.models[label]
    if model.training is not None:
        client.log_inputs(run_id, [DatasetInput(_dataset(summary))])
    client.log_artifact(run_id, summary.items[label])
    if model.judgment is not None:
        adapter = Path(training_of(model).folder) / "adapter"
        _make_readable(adapter)
        client.log_artifacts(run_id, str(adapter), "adapter")
        log_card(client, run_id, summary=summary, label=label)


def _make_readable(folder: Path) -> None:
    """Give files the permissions of new files, since MLflow copies them with theirs.

    safetensors creates its files for their owner only.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        mode = path.stat().st_mode
        wanted = mode | (0o666 & ~mask)
        if path.is_file() and wanted != mode:
            path.chmod(wanted)


def _link_training(
    client: MlflowClient, experiment: str, model: ModelSummary, ended: int | None
) -> Tags:
    """Return the tag that links the run of a model's training, if the experiment has one.

    A training run that is still marked as running is ended.
    """
    if model.training is None:
        return {}
    run = find_run(client, experiment, {TRAINING_TAG: model.training.key})
    if run is None:
        return {}
    if run.info.status == "RUNNING":
        client.set_terminated(run.info.run_id, end_time=ended)
    return {TRAINING_RUN_TAG: str(run.info.run_id)}


def log_card(
    client: MlflowClient, run_id: str, *, summary: Summary, label: str, version: int | None = None
) -> None:
    """Write the model card into the adapter's files of a run; replace an existing card."""
    text = model_card.card(summary, label, version)
    client.log_text(run_id, text, f"adapter/{model_card.FILE}")


def _source_tags(summary: Summary) -> Tags:
    """Return MLflow's tags for the code that created a run."""
    return {
        "mlflow.source.name": f"lora run {summary.name}",
        "mlflow.source.git.commit": summary.commit,
    }


def _run_tags(values: Tags) -> list[RunTag]:
    return [RunTag(key, value) for key, value in values.items()]


def _dataset(summary: Summary) -> Dataset:
    """Return the training data as an MLflow data set, identified by its digest."""
    source = summary.recipe.data.title
    data = summary.data
    profile = {
        "train_examples": data.train_examples,
        "train_tokens": data.train_tokens,
        "supervised_tokens": data.supervised_tokens,
    }
    return Dataset(
        summary.recipe.data.label,
        data.digest[:MAX_DIGEST],
        "local",
        json.dumps({"source": source}),
        profile=json.dumps(profile),
    )
