"""MLflow: the runs of a comparison, and the registered model with its aliases.

A comparison has one parent run with its tables, and a child run for the base, the base in 4 bits,
the control and each rank. Each adapter is a version of one registered model; a control is never
one. Every call can be repeated.

    comparison_runs.py   the runs
    model_versions.py    the versions and aliases
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from lora_core.files import sha256_of_file
from pipelines.comparison.document import Registered, Summary
from pipelines.errors import RegistryError, UnreachableError, one_line
from pipelines.paths import tracking_uri
from pipelines.tracking.comparison_runs import log_comparison, log_documents, log_model
from pipelines.tracking.model_versions import (
    ADAPTER_TAG,
    CHAMPION,
    check_champion_passed,
    move_aliases,
    register_version,
    registered_version,
)
from pipelines.tracking.runs import configure_mlflow_client, ensure_store, experiment_id

WEIGHTS = "adapter_model.safetensors"
NO_ANSWER = "failed with exception"
"""Part of the error of MLflow's client if it cannot reach a server."""


@dataclass(frozen=True)
class FetchedChampion:
    """The registered champion, downloaded."""

    version: str
    adapter_sha256: str
    folder: Path
    """In PEFT format."""
    tags: dict[str, str]


def register(summary: Summary, runs: Path, files: list[Path], note: str) -> Registered:
    """Log a comparison and register its adapters; return run ids, versions and aliases.

    Args:
        summary: the comparison.
        runs: folder of all runs; has the SQLite file unless a server is configured.
        files: report and summary, logged with the parent run.
        note: Markdown, shown on the parent run's page.

    Raises:
        RegistryError: the server does not answer or refuses, and another call resumes where this
            one stopped; or another champion was registered since the comparison, and everything
            but that alias is done.
    """
    check_champion_passed(summary)
    with _connect(runs) as client:
        experiment = experiment_id(client, summary.recipe.registry.experiment or summary.name, runs)
        parent = log_comparison(client, experiment, summary)
        log_documents(client, parent.info.run_id, files, note)
        children = _log_models(client, experiment, parent, summary)
        versions = _register_adapters(client, summary, children)
        client.set_terminated(parent.info.run_id)
        aliases = move_aliases(client, summary, versions)  # last: users read nothing but these
    return Registered(
        tracking_uri=tracking_uri(runs),
        experiment_id=experiment,
        parent_run=parent.info.run_id,
        runs=children,
        model=summary.recipe.registry.model,
        versions=versions,
        aliases=aliases,
    )


def _log_models(
    client: MlflowClient, experiment: str, parent: Run, summary: Summary
) -> dict[str, str]:
    """Log each model of a comparison; return label → run id."""
    children = {}
    for label in summary.models:
        children[label] = log_model(client, experiment, parent, summary=summary, label=label)
    return children


def _register_adapters(
    client: MlflowClient, summary: Summary, children: Mapping[str, str]
) -> dict[str, int]:
    """Register each adapter that is not rejected, from its run; return label → version."""
    versions = {}
    for label in summary.adapters:
        version = register_version(client, summary, label, children[label])
        if version is not None:
            versions[label] = version
    return versions


def describe(registered: Registered, runs: Path, files: list[Path], note: str) -> None:
    """Log report, summary and note of a comparison again, now that they include the registration.

    Args:
        registered: the result of `register`.
        runs: folder of all runs.
        files: report and summary.
        note: Markdown.

    Raises:
        RegistryError: the server does not answer or refuses.
    """
    with _connect(runs) as client:
        log_documents(client, registered.parent_run, files, note)


def fetch_champion(name: str, runs: Path, destination: Path) -> FetchedChampion | None:
    """Download the champion that is registered under `name`; return None if there is none.

    Args:
        name: the registered model.
        runs: folder of all runs.
        destination: gets a folder named after the adapter's digest; a folder that is already there
            and complete is not downloaded again.

    Raises:
        RegistryError: the server does not answer, or its files are not those that were registered.
    """
    with _connect(runs) as client:
        found = registered_version(client, name, CHAMPION)
        if found is None:
            return None
        version = str(found.version)
        sha256 = found.tags.get(ADAPTER_TAG, "")
        folder = destination / sha256[:12]
        if not _is_complete(folder, sha256):
            folder.mkdir(parents=True, exist_ok=True)
            mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=str(folder))
        if not _is_complete(folder, sha256):
            raise RegistryError(
                f"version {version} of {name} does not contain the adapter of its tag "
                f"{ADAPTER_TAG} ({sha256[:12] or 'not set'}); remove the alias {CHAMPION} from it, "
                "or set gate.min_gain_over_champion to null, and run again"
            )
        return FetchedChampion(version, sha256, folder, dict(found.tags))


def download(uri: str, runs: Path, destination: Path) -> Path:
    """Download a registered adapter, `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    with _connect(runs):
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(destination)))


@contextmanager
def _connect(runs: Path) -> Iterator[MlflowClient]:
    """Yield a client; raise MLflow's errors as RegistryError with a note that no result is lost."""
    configure_mlflow_client()
    uri = tracking_uri(runs)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        ensure_store(uri)
        yield MlflowClient()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = one_line(error, with_type=False, limit=300)
        is_unreachable = isinstance(error, ConnectionError) or NO_ANSWER in reason
        kind = UnreachableError if is_unreachable else RegistryError
        raise kind(
            f"MLflow at {uri}: {reason}; the adapters are saved, and the next run of the recipe "
            "registers them"
        ) from error


def _is_complete(folder: Path, sha256: str) -> bool:
    weights = folder / WEIGHTS
    return weights.is_file() and sha256_of_file(weights) == sha256
