"""MLflow: the runs of a comparison, and the registered model with its aliases.

A comparison has one parent run with its tables, and a child run for the base, the base in 4 bits,
the control and each rank. Each adapter is a version of one registered model; a control is never
one. Every call can be repeated.

    comparison_runs.py   the runs
    model_versions.py    the versions
    aliases.py           the aliases
    move_log.py          each move of an alias
    history.py           what users decided
    lease.py             one process at a time
    evidence_files.py    what a version's verdict is computed from

For people: catalog.py, decisions.py, releases.py, pulled.py, bundle_verification.py and cleanup.py.
For administrators: account_roles.py.
"""

from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from lora_core.files import atomic_folder
from pipelines.comparison.document import Registered, Summary
from pipelines.config.alias_names import CHAMPION
from pipelines.config.registry_names import REGISTERED, champion_model
from pipelines.errors import RegistryError, without_credentials
from pipelines.paths import tracking_uri
from pipelines.reporting.origin import FlowRunReference
from pipelines.tracking import version_files
from pipelines.tracking.aliases import check_champion_passed, registered_version
from pipelines.tracking.comparison_runs import (
    ComparisonRuns,
    find_or_create_runs,
    log_adapter_files,
    log_comparison,
    log_documents,
    log_model,
)
from pipelines.tracking.comparison_view import on_server, rank_view
from pipelines.tracking.connection import Access, connect, reading
from pipelines.tracking.lease import Lease, hold_lease
from pipelines.tracking.model_versions import (
    check_adapter_sizes,
    ensure_model,
    register_adapters,
)
from pipelines.tracking.references import Reference
from pipelines.tracking.runs import experiment_id
from pipelines.tracking.tag_names import tags_of
from pipelines.tracking.unfinished_runs import mark_failed

RUN_AGAIN = "the adapters are saved, and the next run of the recipe registers them"


@dataclass(frozen=True)
class FetchedChampion:
    """The registered champion, downloaded."""

    version: str
    adapter_sha256: str
    folder: Path
    """In PEFT format."""
    tags: dict[str, str]


def register(
    summary: Summary, runs: Path, files: list[Path], note: str, flow_run: FlowRunReference
) -> Registered:
    """Log a comparison and register its adapters; return run ids, versions and aliases.

    Args:
        summary: the comparison.
        runs: folder of all runs; has the SQLite file unless a server is configured.
        files: report and summary, logged with the parent run.
        note: Markdown, shown on the parent run's page.
        flow_run: Prefect's; without an id outside one.

    Raises:
        RegistryError: the server does not answer or refuses, and another call resumes where this
            one stopped; or another champion was registered since the comparison, and everything
            but that alias is done.
    """
    check_champion_passed(summary)
    name = summary.recipe.registry.experiment or summary.name
    model = summary.recipe.registry.model
    with connect(runs, Access("EDIT", model, name, RUN_AGAIN)) as client:
        check_adapter_sizes(summary)
        experiment = experiment_id(client, name, runs)
        ensure_model(client, model, f"LoRA adapters of the recipe {summary.name}")
        with mark_failed(client) as created:
            with hold_lease(client, model):
                logged = find_or_create_runs(client, experiment, summary, flow_run)
            created += [logged.parent_id, *logged.ids.values()]
            log_adapter_files(client, logged)
            with hold_lease(client, model) as lease:
                _log_runs(client, lease, logged, files, note)
        # last: users read nothing but the aliases
        versions, aliases = register_adapters(client, summary, logged.ids, flow_run)
    return _registered(logged, runs).model_copy(update={"versions": versions, "aliases": aliases})


def _registered(logged: ComparisonRuns, runs: Path) -> Registered:
    """Return where a comparison was logged, still without versions."""
    uri = tracking_uri(runs)
    experiment = str(logged.parent.info.experiment_id)
    return Registered(
        tracking_uri=without_credentials(uri),
        experiment_id=experiment,
        parent_run=logged.parent_id,
        runs=logged.ids,
        model=logged.summary.recipe.registry.model,
        versions={},
        aliases={},
        page=on_server(uri, rank_view(experiment, logged.parent_id)),
    )


def _log_runs(
    client: MlflowClient, lease: Lease, runs: ComparisonRuns, files: list[Path], note: str
) -> None:
    """Log a comparison and its models; no other process changes their runs."""
    log_comparison(client, runs)
    log_documents(client, runs.parent_id, files, note, runs.flow_run)
    for label in runs.summary.models:
        lease.renew()
        log_model(client, runs, label)
    client.set_terminated(runs.parent_id)


def describe(
    registered: Registered, runs: Path, files: list[Path], note: str, flow_run: FlowRunReference
) -> None:
    """Log report, summary and note of a comparison again, now that they include the registration.

    Args:
        registered: the result of `register`.
        runs: folder of all runs.
        files: report and summary.
        note: Markdown.
        flow_run: see `register`.

    Raises:
        RegistryError: the server does not answer or refuses.
    """
    access = Access("EDIT", registered.model, f"with the id {registered.experiment_id}", RUN_AGAIN)
    with connect(runs, access) as client:
        log_documents(client, registered.parent_run, files, note, flow_run)


def fetch_champion(name: str, runs: Path, destination: Path) -> FetchedChampion | None:
    """Download the champion that is registered under `name`; return None if there is none.

    Args:
        name: the registered model; the champion of `NAME-candidates` is that of `NAME`.
        runs: folder of all runs.
        destination: gets a folder named after the adapter's digest; a folder that is already there
            and complete is not downloaded again.

    Raises:
        RegistryError: the server does not answer, or its files are not those that were registered.
    """
    name = champion_model(name)
    with connect(runs, reading(name)) as client:
        found = registered_version(client, name, CHAMPION)
        if found is None:
            return None
        tags = tags_of(found)
        sha256 = version_files.adapter_digest(found)
        folder = destination / sha256[:12]
        if version_files.objection(tags, folder) is not None:
            with atomic_folder(folder) as aside:
                download_version(found, aside)
        return FetchedChampion(str(found.version), sha256, folder, tags)


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
    reference = Reference.parse(uri)
    with connect(runs, reading(reference.name)) as client:
        return download_version(reference.resolve(client), destination)


def download_version(version: ModelVersion, destination: Path) -> Path:
    """Download a version's files; return their folder.

    Raises:
        RegistryError: they are not those that were registered.
    """
    uri = f"{REGISTERED}{version.name}/{version.version}"
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(destination)))
    objection = version_files.objection(tags_of(version), folder)
    if objection is not None:
        raise RegistryError(
            f"version {version.version} of {version.name} {objection}: its files were changed "
            "after they were registered, or the download was; do not use them. Download it again, "
            f"or remove the aliases from this version, such as {CHAMPION}"
        )
    return folder
