"""The MLflow runs of a comparison: a parent run with its tables, and a child run per model.

Everything here can be repeated. Another evaluation of the same models updates their runs: a metric
gets a newer value, and one that was not measured again becomes NaN, since MLflow deletes none.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Param, Run, RunTag

from pipelines.comparison.comparison import BASE, CONTROL
from pipelines.comparison.document import ModelSummary, Summary
from pipelines.reporting import page_sections
from pipelines.reporting.origin import FlowRunReference
from pipelines.tracking import logged, model_card
from pipelines.tracking.bill_of_materials import BILL_OF_MATERIALS, bill_of_materials
from pipelines.tracking.comparison_view import rank_view, save_rank_view
from pipelines.tracking.description import flow_run_link
from pipelines.tracking.lease import acting_user
from pipelines.tracking.logged import Tags
from pipelines.tracking.mlmodel import MLMODEL, mlmodel_text
from pipelines.tracking.run_identity import (
    IDENTITY_TAG,
    adapter_folder,
    comparison_identity,
    model_identity,
)
from pipelines.tracking.runs import (
    ADAPTER,
    KIND_TAG,
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
FLOW_RUN_TAG = "lora.flow_run"
UPLOADED_TAG = "mlflow.lora.files"
"""On the run of an adapter: its files are complete."""
TABLES_TAG = "mlflow.loggedArtifacts"
NOTE_TAG = "mlflow.note.content"
MAX_DIGEST = 36
"""Characters of a data set's digest that MLflow accepts."""


@dataclass(frozen=True)
class ComparisonRuns:
    """The runs of a comparison."""

    summary: Summary
    parent: Run
    models: Mapping[str, Run]
    """Label → run, as it was found or created."""
    flow_run: FlowRunReference

    @property
    def parent_id(self) -> str:
        """Id of the comparison's run."""
        return str(self.parent.info.run_id)

    @property
    def ids(self) -> dict[str, str]:
        """Label → run id."""
        return {label: str(run.info.run_id) for label, run in self.models.items()}


def find_or_create_runs(
    client: MlflowClient, experiment: str, summary: Summary, flow_run: FlowRunReference
) -> ComparisonRuns:
    """Return the runs of a comparison's models; the caller has the lease, so that none is created
    twice.
    """
    identity = {IDENTITY_TAG: comparison_identity(summary)}
    started = int(1000 * (time.time() - summary.seconds))
    parent = find_or_create_run(client, experiment, summary.name, identity, started)
    client.set_tag(parent.info.run_id, PARENT_TAG, summary.key)
    models = {}
    for label, model in summary.models.items():
        began, _ = logged.training_time(model) or (None, None)
        identity = {IDENTITY_TAG: model_identity(summary, label)}
        models[label] = find_or_create_run(client, experiment, label, identity, began)
    return ComparisonRuns(summary, parent, models, flow_run)


def log_comparison(client: MlflowClient, runs: ComparisonRuns) -> None:
    """Log the tables of a comparison with its own run, and the recipe that repeats it."""
    summary = runs.summary
    run_id = runs.parent_id
    shown = []
    for name, table in tables(summary).items():
        # log_table would append the rows again when it is called again
        client.log_dict(run_id, asdict(table), name)
        shown.append({"path": name, "type": "table"})
    client.log_text(run_id, page_sections.recipe_text(summary), page_sections.RECIPE)
    values = {"lora.decision": summary.decision, TABLES_TAG: json.dumps(shown)}
    values |= {KIND_TAG: "comparison", **_source_tags(runs)}
    client.log_batch(run_id, tags=_run_tags(values))
    save_rank_view(client, str(runs.parent.info.experiment_id), run_id)


def log_documents(
    client: MlflowClient, run_id: str, files: list[Path], note: str, flow_run: FlowRunReference
) -> None:
    """Log the report, the summary and the note of a comparison with its own run.

    The note gets links to the table of the ranks and to the flow run.
    """
    for file in files:
        client.log_artifact(run_id, str(file))
    run = client.get_run(run_id)
    links = [f"[All ranks in a table]({rank_view(str(run.info.experiment_id), run_id)})"]
    if flow_run.id:
        links.append(flow_run_link(flow_run))
    client.set_tag(run_id, NOTE_TAG, f"{note}\n\n{', '.join(links)}\n")


def log_model(client: MlflowClient, runs: ComparisonRuns, label: str) -> None:
    """Log a model's parameters, metrics, training curve, data and item records."""
    summary = runs.summary
    model = summary.models[label]
    run = client.get_run(runs.ids[label])
    run_id = str(run.info.run_id)
    parent = runs.parent_id
    stage = f"{summary.key[:12]}/{label}"
    tags = run.data.tags
    is_logged = tags.get(STAGE_TAG) == stage and tags.get("mlflow.parentRunId") == parent
    if run.info.status == "FINISHED" and is_logged:
        return
    client.update_run(run_id, status="RUNNING")
    _, ended = logged.training_time(model) or (None, None)
    values = {"mlflow.parentRunId": parent, STAGE_TAG: stage, KIND_TAG: _kind(summary, label)}
    values |= logged.run_tags(summary, label) | _source_tags(runs)
    values |= _link_training(client, str(run.info.experiment_id), model, ended)
    params = []
    if not run.data.params:
        for name, value in logged.parameters(summary, label).by_name().items():
            params.append(Param(name, value))
    client.log_batch(run_id, params=params, tags=_run_tags(values))
    log_points(client, run_id, _current_metrics(run, logged.metrics(summary, label)))
    log_points(client, run_id, logged.curve(model))
    if model.training is not None:
        client.log_inputs(run_id, [DatasetInput(_dataset(summary))])
    client.log_artifact(run_id, summary.items[label])
    client.set_terminated(run_id, end_time=ended)


def _kind(summary: Summary, label: str) -> str:
    if summary.models[label].judgment is not None:
        return ADAPTER
    return CONTROL if label == CONTROL else BASE


def _current_metrics(run: Run, measured: Mapping[str, float]) -> list[MetricPoint]:
    """Return the points after which a run has these metrics and no others, except curves.

    Of several values at a step, MLflow shows the one with the latest time.
    """
    values = dict(measured)
    for name, value in run.data.metrics.items():
        is_curve = name.startswith(("train/", "system/"))
        if not is_curve and name not in values and not math.isnan(value):
            values[name] = math.nan
    now = int(1000 * time.time())
    return [(name, value, now, 0) for name, value in values.items()]


def log_adapter_files(client: MlflowClient, runs: ComparisonRuns) -> None:
    """Log the files of each adapter that are not logged yet; a repeated upload changes nothing."""
    summary = runs.summary
    for label in summary.adapters:
        run_id = runs.ids[label]
        if UPLOADED_TAG in runs.models[label].data.tags:
            continue
        folder = adapter_folder(summary, label)
        _make_readable(folder)
        client.log_artifacts(run_id, str(folder), "adapter")
        for name, text in added_files(summary, label).items():
            client.log_text(run_id, text, f"adapter/{name}")
        client.set_tag(run_id, UPLOADED_TAG, "complete")


def added_files(summary: Summary, label: str) -> dict[str, str]:
    """Return name → text of what is stored with an adapter's own files, and never changes."""
    return {
        MLMODEL: mlmodel_text(logged.version_tags(summary, label)),
        BILL_OF_MATERIALS: bill_of_materials(adapter_folder(summary, label)),
    }


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
) -> str:
    """Write the model card into the adapter's files of a run, and return it.

    It replaces an existing card.
    """
    text = model_card.card(summary, label, version)
    client.log_text(run_id, text, f"adapter/{model_card.FILE}")
    return text


def _source_tags(runs: ComparisonRuns) -> Tags:
    """Return MLflow's tags for the author of a run, the code and the flow run."""
    tags = {
        "mlflow.user": acting_user(),
        "mlflow.source.name": f"lora run {runs.summary.name}",
        "mlflow.source.git.commit": runs.summary.commit,
    }
    if runs.flow_run.id:
        tags[FLOW_RUN_TAG] = runs.flow_run.id
    return tags


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
