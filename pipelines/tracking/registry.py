"""MLflow: the runs of a comparison, and the registered model with its aliases.

A comparison has one parent run with its tables, and a child run for the base, the base in 4 bits,
the control and each rank. Each adapter is a version of one registered model; a control is never
one. Every call can be repeated.

    comparison_runs.py   the runs
    model_versions.py    the versions
    aliases.py           the aliases
    history.py           what users decided by hand
    lease.py             one process at a time
"""

from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from lora_core.files import atomic_folder
from pipelines.comparison.document import Registered, Summary
from pipelines.errors import RegistryError
from pipelines.paths import tracking_uri
from pipelines.tracking import version_files
from pipelines.tracking.aliases import CHAMPION, check_champion_passed, registered_version
from pipelines.tracking.comparison_runs import log_comparison, log_documents, log_model
from pipelines.tracking.connection import Access, connect, without_credentials
from pipelines.tracking.history import ADAPTER_TAG
from pipelines.tracking.model_versions import register_adapters
from pipelines.tracking.runs import experiment_id

REGISTERED = "models:/"
RUN_AGAIN = "the adapters are saved, and the next run of the recipe registers them"


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
    name = summary.recipe.registry.experiment or summary.name
    access = Access("EDIT", summary.recipe.registry.model, name, RUN_AGAIN)
    with connect(runs, access) as client:
        experiment = experiment_id(client, name, runs)
        parent = log_comparison(client, experiment, summary)
        log_documents(client, parent.info.run_id, files, note)
        children = _log_models(client, experiment, parent, summary)
        client.set_terminated(parent.info.run_id)
        # last: users read nothing but the aliases
        versions, aliases = register_adapters(client, summary, children)
    return Registered(
        tracking_uri=without_credentials(tracking_uri(runs)),
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
    access = Access("EDIT", registered.model, f"with the id {registered.experiment_id}", RUN_AGAIN)
    with connect(runs, access) as client:
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
    with connect(runs, _reading(name)) as client:
        found = registered_version(client, name, CHAMPION)
        if found is None:
            return None
        sha256 = found.tags.get(ADAPTER_TAG, "")
        folder = destination / sha256[:12]
        if version_files.objection(found, folder) is not None:
            with atomic_folder(folder) as aside:
                _download_version(found, aside)
        return FetchedChampion(str(found.version), sha256, folder, dict(found.tags))


def download(uri: str, runs: Path, destination: Path) -> Path:
    """Download a registered adapter, and verify its files.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        runs: folder of all runs.
        destination: gets the files.

    Raises:
        RegistryError: there is no such version, the server does not answer or refuses, or the
            files are not those that were registered.
    """
    name, version, alias = _parsed(uri)
    with connect(runs, _reading(name)) as client:
        found: ModelVersion | None
        if alias:
            found = registered_version(client, name, alias)
        else:
            found = client.get_model_version(name, version)
        if found is None:
            raise RegistryError(f"{uri}: the registered model {name} has no alias {alias}")
        return _download_version(found, destination)


def _parsed(uri: str) -> tuple[str, str, str]:
    """Return name, version and alias; one of the last two is empty."""
    path = uri.removeprefix(REGISTERED)
    name, _, alias = path.partition("@")
    version = ""
    if not alias:
        name, _, version = path.partition("/")
    if not name or not (alias or version.isdecimal()):
        raise RegistryError(
            f"{uri} does not name a registered adapter; use {REGISTERED}NAME@ALIAS or "
            f"{REGISTERED}NAME/VERSION, where VERSION is a number"
        )
    return name, version, alias


def _download_version(version: ModelVersion, destination: Path) -> Path:
    """Download a version's files; raise RegistryError if they are not those registered."""
    uri = f"{REGISTERED}{version.name}/{version.version}"
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(destination)))
    objection = version_files.objection(version, folder)
    if objection is not None:
        raise RegistryError(
            f"version {version.version} of {version.name} {objection}: its files were changed "
            "after they were registered, or the download was; do not use them. Download it again, "
            f"or remove the aliases from this version, such as {CHAMPION}"
        )
    return folder


def _reading(name: str) -> Access:
    return Access("READ", name, f"with the files of {name}")
