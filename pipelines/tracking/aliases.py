"""Aliases of the registered model.

`champion` moves only to an adapter that passed the gate, and only from the version that it was
compared with. With `registry.promote: propose`, such an adapter gets the alias `proposed`, and a
person decides. An alias never returns to an adapter from which a user took it; see history.py.
"""

from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from pipelines.comparison.document import Summary
from pipelines.config.alias_names import CANDIDATE, CHAMPION, PROPOSED
from pipelines.config.registry_names import champion_model
from pipelines.console import print_status
from pipelines.errors import RegistryError
from pipelines.reporting.model_parts import status_of, training_of
from pipelines.tracking.history import PROPOSE_TAG, History, is_rejected, is_retired
from pipelines.tracking.move_log import ADAPTER_TAG, AliasPosition, MoveLog, MoveScores

CANDIDATE_REASON = "the highest rank that passes or that the data cannot decide"


def move_aliases(
    log: MoveLog, summary: Summary, versions: Mapping[str, int], past: History
) -> dict[str, int]:
    """Point the aliases at the adapters that are put forward; return alias → version.

    MLflow moves one alias at a time. The champion's is the last. The caller has the lease on the
    name.

    Args:
        log: of the registered model.
        summary: the comparison.
        versions: label → version.
        past: the history of the registered model.

    Raises:
        RegistryError: the champion is not the one that the adapters were compared with.
    """
    client = log.client
    aliases = {}
    for alias, label in _wanted_aliases(summary).items():
        if label is None or label not in versions:
            continue
        version = client.get_model_version(log.name, str(versions[label]))
        registered = registered_version(client, log.name, alias)
        objection = _objection(past, alias, version, registered)
        if alias == PROPOSED and objection is None:
            objection = _objection_to_proposal(client, past, version)
        if objection is not None:
            print_status(f"{label} does not become {alias}: {objection}")
            continue
        if alias == CHAMPION:
            _check_champion_was_compared(summary, registered)
        before = None if registered is None else AliasPosition.of(registered)
        after = AliasPosition.of(version)
        set_alias(client, log.name, alias, before=before, after=after)
        if before != after or past.left_at(alias) != after:
            reason = CANDIDATE_REASON if alias == CANDIDATE else summary.decision
            log.record(alias, before, after, reason=reason, scores=MoveScores.of(version))
        aliases[alias] = versions[label]
    return aliases


def _wanted_aliases(summary: Summary) -> dict[str, str | None]:
    """Return alias → label of the adapter that should get it; the last one matters most."""
    best = PROPOSED if summary.recipe.registry.promote == "propose" else CHAMPION
    return {CANDIDATE: summary.candidate, best: summary.champion}


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
    if is_retired(version):
        return f"version {version.version} of {version.name} is retired"
    if is_rejected(version) and sha256 not in past.requested:
        return (
            f"a user rejected version {version.version} of {version.name}; "
            f"{how_to_request(version.name, sha256)}"
        )
    current = None if registered is None else AliasPosition.of(registered)
    if sha256 in past.demoted(alias, current) and sha256 not in past.requested:
        now = "nowhere" if registered is None else f"at version {registered.version}"
        return (
            f"a user took this alias from version {version.version} of {version.name}, and it is "
            f"{now}; {how_to_request(version.name, sha256)}"
        )
    return None


def copied_version(client: MlflowClient, name: str, sha256: str) -> str | None:
    """Return the version of a name that an adapter has or had; None if it never had one."""
    try:
        return History.read(client, name).versions.get(sha256)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return None
        raise


def _objection_to_proposal(
    client: MlflowClient, past: History, version: ModelVersion
) -> str | None:
    """Return why a version need not or must not be proposed as champion."""
    name = champion_model(version.name)
    champion = registered_version(client, name, CHAMPION)
    sha256 = version.tags[ADAPTER_TAG]
    if champion is not None and champion.tags.get(ADAPTER_TAG) == sha256:
        return f"version {champion.version} of {name} is the champion"
    if name == version.name:
        return _objection(past, CHAMPION, version, champion)
    copied = copied_version(client, name, sha256)
    if copied is None or sha256 in past.requested:
        return None
    return (
        f"it was version {copied} of {name}, and a user decided against it: `lora registry history "
        f"{name}` prints why; {how_to_request(version.name, sha256)}"
    )


def set_alias(
    client: MlflowClient,
    name: str,
    alias: str,
    *,
    before: AliasPosition | None,
    after: AliasPosition | None,
) -> None:
    """Move or remove an alias, and read where it is; the caller has the lease on the name.

    Raises:
        RegistryError: someone without the lease moved it at the same time.
    """
    if before == after:
        return
    if after is None:
        client.delete_registered_model_alias(name, alias)
    else:
        client.set_registered_model_alias(name, alias, after.version)
    version = registered_version(client, name, alias)
    found = None if version is None else AliasPosition.of(version)
    if found != after:
        wanted = "removed" if after is None else f"moved to version {after.version}"
        raise RegistryError(
            f"the alias {alias} of {name} was {wanted}, and someone "
            "moved it elsewhere at the same time; run the command again"
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
        f"to propose it once more, set the tag {PROPOSE_TAG}{sha256} of the registered "
        f"model {name} to true, and run the recipe again"
    )
