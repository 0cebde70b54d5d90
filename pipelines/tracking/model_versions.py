"""Versions of the registered model.

A version has the files of the adapter and its card only. It is looked up by the adapter's digest
before it is created. All of it happens under a lease on the name, and the aliases move last.
"""

from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from pipelines.comparison.document import Summary
from pipelines.console import print_status
from pipelines.errors import RegistryError
from pipelines.reporting.model_parts import status_of, training_of
from pipelines.tracking import history, logged
from pipelines.tracking.aliases import how_to_request, move_aliases
from pipelines.tracking.comparison_runs import log_card
from pipelines.tracking.history import ADAPTER_TAG, History
from pipelines.tracking.lease import hold_lease
from pipelines.tracking.version_files import file_tags

MAX_ADAPTER_FRACTION = 0.5
"""Files larger than this fraction of the base's weights in 2 bytes are not an adapter."""
Versions = dict[str, int]


def register_adapters(
    client: MlflowClient, summary: Summary, run_ids: Mapping[str, str]
) -> tuple[Versions, Versions]:
    """Register each adapter that is not rejected, then move the aliases.

    Args:
        client: of the registry.
        summary: the comparison.
        run_ids: label → run with the adapter's files.

    Returns:
        Label → version, and the aliases that are where the comparison puts them → version.

    Raises:
        RegistryError: a file is too large, another process has the name for too long, or the
            champion is not the one that the adapters were compared with.
    """
    name = summary.recipe.registry.model
    for model in summary.adapters.values():
        _check_adapter_size(_adapter_folder(training_of(model).folder), summary.base.weights)
    _ensure_registered_model(client, summary)
    versions: Versions = {}
    with hold_lease(client, name) as lease:
        past = History.read(client, name)
        for label in summary.adapters:
            lease.renew()
            version = _register_version(client, summary, label, run_id=run_ids[label], past=past)
            if version is not None:
                versions[label] = version
        lease.renew()
        aliases = move_aliases(client, summary, versions, past)
        _clear_requests(client, summary, past)
    return versions, aliases


def _register_version(
    client: MlflowClient, summary: Summary, label: str, *, run_id: str, past: History
) -> int | None:
    """Register an adapter, or update the tags and the card of the version with the same bytes.

    Returns:
        The version. None for a rejected adapter, and for one whose version was deleted: it gets no
        version, and its run has its files.
    """
    model = summary.models[label]
    name = summary.recipe.registry.model
    tags = logged.version_tags(summary, label)
    sha256 = tags[ADAPTER_TAG]
    known = _versions_of(client, name, sha256)
    if known:
        version = known[0]
        _update_tags(client, name, version, tags)
    elif status_of(model) == "reject":
        return None
    elif sha256 in past.versions and sha256 not in past.requested:
        print_status(
            f"{label} is not registered again: version {past.versions[sha256]} of {name} with the "
            f"same bytes was deleted; {how_to_request(name, sha256)}"
        )
        return None
    else:
        # the files may differ between two trainings with equal weights, so only the first sets them
        tags |= file_tags(_adapter_folder(training_of(model).folder))
        version = _create_version(client, name, run_id, tags)
    number = int(version.version)
    # the version's files are in the run that registered it
    with_files = version.run_id or run_id
    log_card(client, with_files, summary=summary, label=label, version=number)
    if past.versions.get(sha256) != str(number):
        history.record_version(client, name, sha256, str(number))
    return number


def _create_version(
    client: MlflowClient, name: str, run_id: str, tags: dict[str, str]
) -> ModelVersion:
    """Create a version, once: a request that was repeated on its way may have created several."""
    source = f"{client.get_run(run_id).info.artifact_uri}/adapter"
    client.create_model_version(name, source, run_id, tags=tags)
    first, *others = _versions_of(client, name, tags[ADAPTER_TAG])
    for other in others:
        client.delete_model_version(name, str(other.version))
    return first


def _versions_of(client: MlflowClient, name: str, sha256: str) -> list[ModelVersion]:
    """Return the versions with an adapter's bytes, the lowest number first."""
    found = []
    for version in client.search_model_versions(_name_query(name)):
        if version.tags.get(ADAPTER_TAG) == sha256:
            found.append(version)
    return sorted(found, key=lambda version: int(version.version))


def _ensure_registered_model(client: MlflowClient, summary: Summary) -> None:
    """Create the registered model; another process may have been faster."""
    description = f"LoRA adapters of the recipe {summary.name}"
    try:
        client.create_registered_model(summary.recipe.registry.model, description=description)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise


def _update_tags(
    client: MlflowClient, name: str, version: ModelVersion, tags: dict[str, str]
) -> None:
    for key in sorted(tags):
        if version.tags.get(key) != tags[key]:
            client.set_model_version_tag(name, version.version, key, tags[key])


def _clear_requests(client: MlflowClient, summary: Summary, past: History) -> None:
    """Remove the requests for the adapters of this comparison: each counts for one run."""
    for model in summary.adapters.values():
        sha256 = training_of(model).result.saved.adapter_sha256
        if sha256 in past.requested:
            history.clear_request(client, summary.recipe.registry.model, sha256)


def _name_query(name: str) -> str:
    """Return the search query for a name, which may contain an apostrophe."""
    return f'name = "{name}"' if "'" in name else f"name = '{name}'"


def _adapter_folder(stage: str) -> Path:
    return Path(stage) / "adapter"


def _check_adapter_size(adapter: Path, base_weights: int) -> None:
    size = sum(path.stat().st_size for path in adapter.iterdir())
    limit = MAX_ADAPTER_FRACTION * 2 * base_weights
    if size > limit:
        raise RegistryError(
            f"{adapter} has {size:,} bytes, near the size of a base "
            f"(the limit is {limit:,.0f} bytes); lower the rank"
        )
