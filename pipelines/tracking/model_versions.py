"""Versions of the registered model.

A version has the files of the adapter, its card and its evidence. It is looked up by the adapter's
digest before it is created. All of it happens under a lease on the name, and the aliases move last.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from pipelines.comparison.document import Summary
from pipelines.console import print_status
from pipelines.errors import RegistryError
from pipelines.reporting.model_parts import status_of, training_of
from pipelines.reporting.origin import NO_FLOW_RUN, FlowRunReference
from pipelines.tracking import history, logged
from pipelines.tracking.aliases import how_to_request, move_aliases
from pipelines.tracking.comparison_runs import added_files, log_card
from pipelines.tracking.description import Origin, describe_version, description
from pipelines.tracking.evidence_files import evidence_of, evidence_texts
from pipelines.tracking.history import History
from pipelines.tracking.lease import acting_user, hold_lease
from pipelines.tracking.move_log import ADAPTER_TAG
from pipelines.tracking.run_identity import adapter_folder
from pipelines.tracking.tag_names import stored_name, stored_tags, tags_of
from pipelines.tracking.version_files import (
    CARD_TAG,
    EVIDENCE,
    EVIDENCE_TAG,
    digest_of_files,
    file_tags,
)

AUTHOR_TAG = "author"
FLOW_RUN_TAG = "flow_run"
PAGE = 1000
"""Versions that are read in one request."""
MAX_ADAPTER_FRACTION = 0.5
"""Files larger than this fraction of the base's weights in 2 bytes are not an adapter."""
Versions = dict[str, int]


@dataclass(frozen=True)
class Registration:
    """What a comparison registers."""

    summary: Summary
    evidence: Mapping[str, str]
    """File of the evidence → its text."""
    past: History
    """Of the registered model."""
    flow_run: FlowRunReference

    @property
    def name(self) -> str:
        """Name of the registered model."""
        return self.summary.recipe.registry.model


def register_adapters(
    client: MlflowClient,
    summary: Summary,
    run_ids: Mapping[str, str],
    flow_run: FlowRunReference = NO_FLOW_RUN,
) -> tuple[Versions, Versions]:
    """Register each adapter that is not rejected, then move the aliases.

    Args:
        client: of the registry, which has the registered model.
        summary: the comparison.
        run_ids: label → run with the adapter's files.
        flow_run: Prefect's.

    Returns:
        Label → version, and the aliases that are where the comparison puts them → version.

    Raises:
        RegistryError: a file is too large, another process has the name for too long, or the
            champion is not the one that the adapters were compared with.
    """
    name = summary.recipe.registry.model
    evidence = evidence_texts(evidence_of(summary))
    versions: Versions = {}
    with hold_lease(client, name) as lease:
        past = History.read(client, name)
        registration = Registration(summary, evidence, past, flow_run)
        for label in summary.adapters:
            lease.renew()
            version = _register_version(client, registration, label, run_id=run_ids[label])
            if version is None:
                log_card(client, run_ids[label], summary=summary, label=label)
            else:
                versions[label] = version
        lease.renew()
        log = past.log(client, name, flow_run.id)
        aliases = move_aliases(log, summary, versions, past)
        _clear_requests(client, summary, past)
    return versions, aliases


def _register_version(
    client: MlflowClient, registration: Registration, label: str, *, run_id: str
) -> int | None:
    """Register an adapter, or update the tags and the card of the version with the same bytes.

    Returns:
        The version. None for a rejected adapter, and for one whose version was deleted: it gets no
        version, and its run has its files.
    """
    summary = registration.summary
    past = registration.past
    model = summary.models[label]
    name = registration.name
    tags = logged.version_tags(summary, label)
    sha256 = tags[ADAPTER_TAG]
    known = versions_of(client, name, sha256)
    if known:
        version = known[0]
        update_tags(client, version, tags)
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
        added = _logged_files(client, run_id, added_files(summary, label))
        tags |= file_tags(adapter_folder(summary, label), added)
        tags |= {AUTHOR_TAG: acting_user(), FLOW_RUN_TAG: registration.flow_run.id}
        version = _create_version(client, name, run_id, tags)
    number = int(version.version)
    _log_documents(client, registration, label, version=version, run_id=run_id)
    _describe(client, registration, label, version=version, run_id=run_id)
    if past.versions.get(sha256) != str(number):
        history.record_version(client, name, sha256, str(number))
    return number


def _log_documents(
    client: MlflowClient,
    registration: Registration,
    label: str,
    *,
    version: ModelVersion,
    run_id: str,
) -> None:
    """Write the card and the evidence into a version's files, then their digests into its tags."""
    # the version's files are in the run that registered it
    with_files = version.run_id or run_id
    summary = registration.summary
    text = log_card(client, with_files, summary=summary, label=label, version=int(version.version))
    tags = {CARD_TAG: hashlib.sha256(text.encode()).hexdigest()}
    digests = {}
    for file, content in sorted(registration.evidence.items()):
        digests[file] = hashlib.sha256(content.encode()).hexdigest()
    tags[EVIDENCE_TAG] = digest_of_files(digests)
    if tags_of(version).get(EVIDENCE_TAG) != tags[EVIDENCE_TAG]:
        for file, content in registration.evidence.items():
            client.log_text(with_files, content, f"adapter/{EVIDENCE}/{file}")
    update_tags(client, version, tags)


def _describe(
    client: MlflowClient,
    registration: Registration,
    label: str,
    *,
    version: ModelVersion,
    run_id: str,
) -> None:
    """Write a version's description; author and flow run are those that registered it."""
    run = client.get_run(run_id)
    tags = tags_of(client.get_model_version(version.name, str(version.version)))
    flow_run = registration.flow_run
    registered_by = tags.get(FLOW_RUN_TAG, "")
    origin = Origin(
        author=tags.get(AUTHOR_TAG, ""),
        flow_run=flow_run if flow_run.id == registered_by else FlowRunReference(registered_by),
        experiment=str(run.info.experiment_id),
        parent_run=run.data.tags.get("mlflow.parentRunId", ""),
    )
    describe_version(client, version, description(registration.summary, label, origin))


def _logged_files(client: MlflowClient, run_id: str, added: Mapping[str, str]) -> dict[str, str]:
    """Return those of the added files that the run has; an earlier release logged fewer."""
    logged_names = {Path(entry.path).name for entry in client.list_artifacts(run_id, "adapter")}
    return {name: text for name, text in added.items() if name in logged_names}


def _create_version(
    client: MlflowClient, name: str, run_id: str, tags: dict[str, str]
) -> ModelVersion:
    """Create a version, once: a request that was repeated on its way may have created several."""
    source = f"{client.get_run(run_id).info.artifact_uri}/adapter"
    client.create_model_version(name, source, run_id, tags=stored_tags(tags))
    first, *others = versions_of(client, name, tags[ADAPTER_TAG])
    for other in others:
        client.delete_model_version(name, str(other.version))
    return first


def versions_of(client: MlflowClient, name: str, sha256: str) -> list[ModelVersion]:
    """Return the versions with an adapter's bytes, the lowest number first."""
    found = []
    for version in all_versions(client, name):
        if version.tags.get(ADAPTER_TAG) == sha256:
            found.append(version)
    return found


def all_versions(client: MlflowClient, name: str = "") -> list[ModelVersion]:
    """Return the versions of a registered model, or of all, ordered by name and number."""
    query = _name_query(name) if name else None
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(query, max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    return sorted(found, key=lambda version: (version.name, int(version.version)))


def ensure_model(client: MlflowClient, name: str, description: str) -> None:
    """Create a registered model; another process may have been faster."""
    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise


def update_tags(client: MlflowClient, version: ModelVersion, tags: Mapping[str, str]) -> None:
    """Set the tags of a version that have another value, under the names that are stored."""
    for name in sorted(tags):
        key = stored_name(name)
        if version.tags.get(key) != tags[name]:
            client.set_model_version_tag(version.name, version.version, key, tags[name])
        if key != name and name in version.tags:  # written by an earlier release
            client.delete_model_version_tag(version.name, version.version, name)


def _clear_requests(client: MlflowClient, summary: Summary, past: History) -> None:
    """Remove the requests for the adapters of this comparison: each counts for one run."""
    for model in summary.adapters.values():
        sha256 = training_of(model).result.saved.adapter_sha256
        if sha256 in past.requested:
            history.clear_request(client, summary.recipe.registry.model, sha256)


def _name_query(name: str) -> str:
    """Return the search query for a name, which may contain an apostrophe."""
    return f'name = "{name}"' if "'" in name else f"name = '{name}'"


def check_adapter_sizes(summary: Summary) -> None:
    """Raise RegistryError if the files of an adapter are near the size of its base."""
    for label in summary.adapters:
        _check_adapter_size(adapter_folder(summary, label), summary.base.weights)


def _check_adapter_size(adapter: Path, base_weights: int) -> None:
    size = sum(path.stat().st_size for path in adapter.iterdir())
    limit = MAX_ADAPTER_FRACTION * 2 * base_weights
    if size > limit:
        raise RegistryError(
            f"{adapter} has {size:,} bytes, near the size of a base "
            f"(the limit is {limit:,.0f} bytes); lower the rank"
        )
