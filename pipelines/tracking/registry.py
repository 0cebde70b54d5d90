"""MLflow: the runs that everyone compares, and the registered model whose aliases everyone pulls.

One parent run for a comparison, with its tables, and a child for the base, the base in 4 bits, the control and each
rank. Each adapter is a version of one registered model; its bytes are the adapter's and its card's alone, and a control is
never one. Everything here can be repeated: runs and versions are looked up by digest before they are made, and aliases
move last: `champion` only to what passed, and only from the version that it was compared with.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Param, Run, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from lora_core.files import sha256_of_file
from pipelines.comparison.comparison import CONTROL
from pipelines.errors import RegistryError, UnreachableError
from pipelines.paths import tracking_uri
from pipelines.reporting import page_sections
from pipelines.tracking import logged, model_card
from pipelines.tracking.runs import (
    PARENT_TAG,
    STAGE_TAG,
    TRAINING_TAG,
    configure_mlflow_client,
    experiment_id,
    find_run,
    log_points,
    make_store,
    reason_of,
    run_of,
)
from pipelines.tracking.tables import tables

MAX_ADAPTER_SHARE = 0.5
"""An artefact larger than this share of the base's weights in 2 bytes is no adapter."""
ADAPTER_TAG = "adapter_sha256"
TRAINING_RUN_TAG = "lora.training_run"
TABLES_TAG, NOTE_TAG = "mlflow.loggedArtifacts", "mlflow.note.content"
CANDIDATE, CHAMPION = "candidate", "champion"
WEIGHTS = "adapter_model.safetensors"
NO_ANSWER = "failed with exception"
"""What MLflow's client says of a server that it could not reach."""


@dataclass(frozen=True)
class Incumbent:
    """The registered champion, fetched."""

    version: str
    adapter_sha256: str
    folder: Path
    """In PEFT's format."""
    tags: dict[str, str]


def register(summary: dict[str, Any], runs: Path, files: list[Path], note: str) -> dict[str, Any]:
    """Log a comparison and register its adapters; return run ids, versions and aliases.

    Args:
        summary: see `pipelines.comparison.comparison`, with `name`, `key`, `base`, `data` and `incumbent` beside it.
        runs: folder of all runs; holds the SQLite file unless a server is named.
        files: report and summary, logged with the parent run.
        note: Markdown, shown on the parent run's page.

    Raises:
        RegistryError: the server does not answer or refuses, and calling again goes on where it stopped; or another
            champion was registered since the comparison, and all but that alias is done.
    """
    _refuse_a_doubtful_champion(summary)
    with _answering(runs) as client:
        experiment = experiment_id(
            client, summary["recipe"]["registry"]["experiment"] or summary["name"], runs
        )
        parent = _parent(client, experiment, summary)
        _describe(client, parent.info.run_id, files, note)
        children = {
            label: _child(client, experiment, parent, summary, label) for label in summary["models"]
        }
        found = {
            label: _version(client, summary, label, children[label]) for label in _adapters(summary)
        }
        versions = {label: version for label, version in found.items() if version is not None}
        client.set_terminated(parent.info.run_id)
        aliases = _move_aliases(client, summary, versions)  # last: consumers read nothing but these
    return {
        "tracking_uri": tracking_uri(runs),
        "experiment_id": experiment,
        "parent_run": parent.info.run_id,
        "runs": children,
        "model": summary["recipe"]["registry"]["model"],
        "versions": versions,
        "aliases": aliases,
    }


def describe(registered: dict[str, Any], runs: Path, files: list[Path], note: str) -> None:
    """Log report, summary and note of a comparison anew, now that they say what is registered.

    Args:
        registered: what `register` returned.
        runs: folder of all runs.
        files: report and summary.
        note: Markdown.

    Raises:
        RegistryError: the server does not answer or refuses.
    """
    with _answering(runs) as client:
        _describe(client, registered["parent_run"], files, note)


def incumbent(name: str, runs: Path, destination: Path) -> Incumbent | None:
    """Fetch the champion that is registered under `name`; None where there is none.

    Args:
        name: the registered model.
        runs: folder of all runs.
        destination: gets a folder named by the adapter's digest; one that is there and whole is not fetched again.

    Raises:
        RegistryError: the server does not answer, or what it holds is not what was registered.
    """
    with _answering(runs) as client:
        found = _registered(client, name, CHAMPION)
        if found is None:
            return None
        version, sha256 = str(found.version), found.tags.get(ADAPTER_TAG, "")
        folder = destination / sha256[:12]
        if not _is_whole(folder, sha256):
            folder.mkdir(parents=True, exist_ok=True)
            mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=str(folder))
        if not _is_whole(folder, sha256):
            raise RegistryError(
                f"version {version} of {name} does not hold the adapter of its tag {ADAPTER_TAG} ({sha256[:12] or 'not set'}); take the "
                f"alias {CHAMPION} from it, or set gate.min_gain_over_champion to null, and run again"
            )
        return Incumbent(version, sha256, folder, dict(found.tags))


def download(uri: str, runs: Path, destination: Path) -> Path:
    """Fetch a registered adapter, `models:/NAME@ALIAS` or `models:/NAME/VERSION`, into `destination`."""
    with _answering(runs):
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(destination)))


@contextmanager
def _answering(runs: Path) -> Iterator[MlflowClient]:
    """Yield a client, and turn MLflow's errors into one sentence that says nothing is lost."""
    configure_mlflow_client()
    uri = tracking_uri(runs)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        make_store(uri)
        yield MlflowClient()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = reason_of(error)
        kind = (
            UnreachableError
            if isinstance(error, ConnectionError) or NO_ANSWER in reason
            else RegistryError
        )
        raise kind(
            f"MLflow at {uri}: {reason}; the adapters are kept, and the next run of the recipe registers them"
        ) from error


def _parent(client: MlflowClient, experiment: str, summary: dict[str, Any]) -> Run:
    """Make the comparison's own run, or find it; log its tables, and the recipe that repeats it."""
    run = run_of(
        client,
        experiment,
        summary["name"],
        {PARENT_TAG: summary["key"]},
        int(1000 * (time.time() - summary["seconds"])),
    )
    run_id = run.info.run_id
    found = tables(summary)
    for name, table in found.items():
        client.log_dict(
            run_id, table, name
        )  # not log_table, which adds the rows again when it is called again
    client.log_text(run_id, page_sections.recipe_text(summary), page_sections.RECIPE)
    shown = json.dumps([{"path": name, "type": "table"} for name in found])
    tags = {"lora.decision": summary["decision"], TABLES_TAG: shown, **_source(summary)}
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return run


def _describe(client: MlflowClient, run_id: str, files: list[Path], note: str) -> None:
    """Log what people read of a comparison with its own run."""
    for file in files:
        client.log_artifact(run_id, str(file))
    client.set_tag(run_id, NOTE_TAG, note)


def _child(
    client: MlflowClient, experiment: str, parent: Run, summary: dict[str, Any], label: str
) -> str:
    """Log one model's parameters, figures, training curve, data and files; return the run's id."""
    model = summary["models"][label]
    began, ended = logged.training_time(model) or (None, None)
    tags = {"mlflow.parentRunId": parent.info.run_id, STAGE_TAG: f"{summary['key'][:12]}/{label}"}
    run = run_of(client, experiment, label, tags, began)
    run_id = str(run.info.run_id)
    if run.info.status == "FINISHED":
        return run_id
    link = _link(client, experiment, model, ended)
    client.log_batch(
        run_id,
        params=[]
        if run.data.params
        else [Param(name, value) for name, value in logged.parameters(summary, label).items()],
        tags=[
            RunTag(key, value)
            for key, value in {
                **logged.run_tags(summary, label),
                **_source(summary),
                **link,
            }.items()
        ],
    )
    log_points(
        client,
        run_id,
        [(name, value, ended or 0, 0) for name, value in logged.metrics(model).items()],
    )
    log_points(client, run_id, logged.curve(model))
    if "folder" in model:
        client.log_inputs(run_id, [DatasetInput(_dataset(summary))])
    client.log_artifact(run_id, summary["items"][label])
    if label in _adapters(summary):
        client.log_artifacts(run_id, str(Path(model["folder"]) / "adapter"), "adapter")
        _write_card(client, run_id, summary, label)
    client.set_terminated(run_id, end_time=ended)
    return run_id


def _link(
    client: MlflowClient, experiment: str, model: dict[str, Any], ended: int | None
) -> dict[str, str]:
    """Return the tag that names the run of a model's training, where one lies in the experiment; one that nobody ended is ended."""
    training = (
        find_run(client, experiment, {TRAINING_TAG: model["key"]}) if "key" in model else None
    )
    if training is None:
        return {}
    if training.info.status == "RUNNING":
        client.set_terminated(training.info.run_id, end_time=ended)
    return {TRAINING_RUN_TAG: str(training.info.run_id)}


def _write_card(client: MlflowClient, run_id: str, summary: dict[str, Any], label: str) -> None:
    """Put the card beside the adapter's files in a run, over the one that is there."""
    client.log_text(run_id, model_card.card(summary, label), f"adapter/{model_card.FILE}")


def _source(summary: dict[str, Any]) -> dict[str, str]:
    """Return the tags by which MLflow names the code that made a run."""
    return {
        "mlflow.source.name": f"lora run {summary['name']}",
        "mlflow.source.git.commit": summary["commit"],
    }


def _dataset(summary: dict[str, Any]) -> Dataset:
    """Name the training data by its digest, of which MLflow takes 36 characters."""
    source = summary["recipe"]["data"]["source"]
    profile = {
        name: summary["data"][name]
        for name in ("train_examples", "train_tokens", "supervised_tokens")
    }
    return Dataset(
        Path(source).name,
        summary["data"]["digest"][:36],
        "local",
        json.dumps({"source": source}),
        profile=json.dumps(profile),
    )


def _adapters(summary: dict[str, Any]) -> list[str]:
    """Return the labels of what is registered: what the gate judged, and never a control."""
    return [
        label
        for label, model in summary["models"].items()
        if "verdict" in model and label != CONTROL
    ]


def _version(client: MlflowClient, summary: dict[str, Any], label: str, run_id: str) -> int | None:
    """Register an adapter, or say on the version of its very bytes what is known of it now; return the version.

    An adapter that is rejected gets no version, and None is returned: its run keeps its files.
    """
    model, name = summary["models"][label], summary["recipe"]["registry"]["model"]
    tags = logged.version_tags(summary, label)
    _refuse_a_base(Path(model["folder"]) / "adapter", summary["base"]["weights"])
    if not client.search_registered_models(_of_name(name)):
        client.create_registered_model(
            name, description=f"LoRA adapters of the recipe {summary['name']}"
        )
    for known in client.search_model_versions(_of_name(name)):
        if known.tags.get(ADAPTER_TAG) == tags[ADAPTER_TAG]:
            _write_card(
                client, known.run_id or run_id, summary, label
            )  # the version's files lie in the run that registered it
            for key in sorted(tag for tag, value in tags.items() if known.tags.get(tag) != value):
                client.set_model_version_tag(name, known.version, key, tags[key])
            return int(known.version)
    if model["verdict"]["status"] == "reject":
        return None
    source = f"{client.get_run(run_id).info.artifact_uri}/adapter"
    return int(client.create_model_version(name, source, run_id, tags=tags).version)


def _move_aliases(
    client: MlflowClient, summary: dict[str, Any], versions: dict[str, int]
) -> dict[str, int]:
    """Point the aliases at what was put forward; MLflow moves one at a time, and the champion's is the last."""
    name = summary["recipe"]["registry"]["model"]
    aliases = {
        alias: versions[summary[alias]]
        for alias in (CANDIDATE, CHAMPION)
        if summary[alias] is not None
    }
    for alias, version in aliases.items():
        if alias == CHAMPION:
            _refuse_another_champion(summary, _registered(client, name, CHAMPION))
        client.set_registered_model_alias(name, alias, str(version))
    return aliases


def _registered(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Return the version that an alias of a registered model names; None where there is no such model or alias."""
    found = client.search_registered_models(_of_name(name))
    version = found[0].aliases.get(alias) if found else None
    return None if version is None else client.get_model_version(name, str(version))


def _of_name(name: str) -> str:
    """Return the query for what bears a name, which may hold an apostrophe."""
    return f'name = "{name}"' if "'" in name else f"name = '{name}'"


def _refuse_a_doubtful_champion(summary: dict[str, Any]) -> None:
    """Refuse to put forward for use what the gate did not pass."""
    label = summary[CHAMPION]
    status = None if label is None else summary["models"][label].get("verdict", {}).get("status")
    if label is not None and status != "pass":
        raise RegistryError(
            f"{label} is named champion, but its verdict is {status!r}; only an adapter that passes can be one: judge again"
        )


def _refuse_another_champion(summary: dict[str, Any], registered: ModelVersion | None) -> None:
    """Refuse to replace a champion that was registered, or taken away, after the comparison had begun."""
    name, held = summary["recipe"]["registry"]["model"], summary["incumbent"]
    if summary["recipe"]["gate"]["min_gain_over_champion"] is None:
        return
    sha256 = None if registered is None else registered.tags.get(ADAPTER_TAG)
    compared = {held["adapter_sha256"] if held else None}
    compared |= {
        summary["models"][label]["figures"]["adapter_sha256"] for label in _adapters(summary)
    }
    if sha256 not in compared:
        now = (
            "has no champion"
            if registered is None
            else f"has version {registered.version} as its champion"
        )
        then = f"version {held['version']}" if held else "none"
        raise RegistryError(
            f"{name} {now}, but {summary[CHAMPION]} was compared with {then}; run the recipe again, which compares it with what is "
            f"registered now. All is registered, and the alias {CHAMPION} has not moved"
        )


def _is_whole(folder: Path, sha256: str) -> bool:
    weights = folder / WEIGHTS
    return weights.is_file() and sha256_of_file(weights) == sha256


def _refuse_a_base(adapter: Path, base_weights: int) -> None:
    size = sum(path.stat().st_size for path in adapter.iterdir())
    limit = MAX_ADAPTER_SHARE * 2 * base_weights
    if size > limit:
        raise RegistryError(
            f"{adapter} holds {size:,} bytes, near the size of a base ({limit:,.0f} is the limit); lower the rank"
        )
