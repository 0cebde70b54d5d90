"""Aliases of the registered model.

`champion` moves only to an adapter that passed the gate, and only from the version that it was
compared with. An alias never returns to an adapter from which a user took it; see history.py.
"""

from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from pipelines.comparison.document import Summary
from pipelines.console import print_status
from pipelines.errors import RegistryError
from pipelines.reporting.model_parts import status_of, training_of
from pipelines.tracking import history
from pipelines.tracking.history import ADAPTER_TAG, AliasPosition, History

CANDIDATE = "candidate"
CHAMPION = "champion"


def move_aliases(
    client: MlflowClient, summary: Summary, versions: Mapping[str, int], past: History
) -> dict[str, int]:
    """Point the aliases at the adapters that are put forward; return alias → version.

    MLflow moves one alias at a time. The champion's is the last. The caller has the lease on the
    name.

    Args:
        client: of the registry.
        summary: the comparison.
        versions: label → version.
        past: the history of the registered model.

    Raises:
        RegistryError: the champion is not the one that the adapters were compared with.
    """
    name = summary.recipe.registry.model
    count = len(past.moves)
    aliases = {}
    for alias, label in ((CANDIDATE, summary.candidate), (CHAMPION, summary.champion)):
        if label is None or label not in versions:
            continue
        version = client.get_model_version(name, str(versions[label]))
        registered = registered_version(client, name, alias)
        objection = _objection(past, alias, version, registered)
        if objection is not None:
            print_status(f"{label} does not become {alias}: {objection}")
            continue
        if alias == CHAMPION:
            _check_champion_was_compared(summary, registered)
        before = None if registered is None else AliasPosition.of(registered)
        after = AliasPosition.of(version)
        _set_alias(client, name, alias, before=before, after=after)
        last = past.last_move(alias)
        if before != after or last is None or last.after != after:
            move = history.new_move(alias, before, after, summary.decision)
            history.record_move(client, name, move, count)
            count += 1
        aliases[alias] = versions[label]
    return aliases


def registered_version(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Return the version with an alias; None if the model or the alias does not exist.

    A search would leave out what the user may not read, and the alias would seem not to exist.
    """
    try:
        version = client.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return None
        raise
    return None if version is None else client.get_model_version(name, str(version))


def check_champion_passed(summary: Summary) -> None:
    """Raise RegistryError if the champion of the summary did not pass the gate."""
    label = summary.champion
    if label is None:
        return
    status = status_of(summary.models[label])
    if status != "pass":
        raise RegistryError(
            f"{label} is named champion, but its verdict is {status!r}; "
            "only an adapter that passes can be champion: run the comparison again"
        )


def _objection(
    past: History, alias: str, version: ModelVersion, registered: ModelVersion | None
) -> str | None:
    """Return which decision of a user keeps an alias from a version; None if there is none."""
    sha256 = version.tags[ADAPTER_TAG]
    if registered is not None and registered.version == version.version:
        return None
    if history.is_retired(version):
        return f"version {version.version} of {version.name} is retired"
    current = None if registered is None else AliasPosition.of(registered)
    if sha256 in past.demoted(alias, current) and sha256 not in past.requested:
        now = "nowhere" if registered is None else f"at version {registered.version}"
        return (
            f"a user took this alias from version {version.version} of {version.name}, and it is "
            f"{now}; {how_to_request(version.name, sha256)}"
        )
    return None


def _set_alias(
    client: MlflowClient,
    name: str,
    alias: str,
    *,
    before: AliasPosition | None,
    after: AliasPosition,
) -> None:
    """Move an alias, and read where it is."""
    if before != after:
        client.set_registered_model_alias(name, alias, after.version)
        found = registered_version(client, name, alias)
        if found is None or AliasPosition.of(found) != after:
            raise RegistryError(
                f"the alias {alias} of {name} was moved to version {after.version}, and someone "
                "moved it elsewhere at the same time; run the recipe again"
            )


def _check_champion_was_compared(summary: Summary, registered: ModelVersion | None) -> None:
    """Raise RegistryError if the champion was replaced or removed after the comparison started."""
    if summary.recipe.gate.min_gain_over_champion is None:
        return
    champion = summary.registered_champion
    compared = {None if champion is None else champion.adapter_sha256}
    for model in summary.adapters.values():
        compared.add(training_of(model).result.saved.adapter_sha256)
    sha256 = None if registered is None else registered.tags.get(ADAPTER_TAG)
    if sha256 in compared:
        return
    name = summary.recipe.registry.model
    now = "has no champion"
    if registered is not None:
        now = f"has version {registered.version} as its champion"
    then = "none" if champion is None else f"version {champion.version}"
    raise RegistryError(
        f"{name} {now}, but {summary.champion} was compared with {then}; "
        "run the recipe again to compare it with the champion that is registered now. "
        f"Everything is registered, and the alias {CHAMPION} has not moved"
    )


def how_to_request(name: str, sha256: str) -> str:
    """Return how a user has an adapter proposed once more."""
    return (
        f"to propose it once more, set the tag {history.PROPOSE_TAG}{sha256} of the registered "
        f"model {name} to true, and run the recipe again"
    )
