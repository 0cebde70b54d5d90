"""What people decide about versions: promote, reject, roll back, retire.

Each decision has a reason, verifies the version's files, holds the lease on the name, compares the
alias with what the log records, and is appended to the log.
"""

import re
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipelines.config.alias_names import CHAMPION, PROPOSED
from pipelines.errors import RegistryError
from pipelines.tracking.aliases import registered_version
from pipelines.tracking.connection import connect, editing
from pipelines.tracking.history import (
    REJECTED_TAG,
    RETIRED_TAG,
    History,
    earlier_holders,
    is_rejected,
    is_retired,
)
from pipelines.tracking.logged import ANY_CHAMPION, COMPARED_TAG
from pipelines.tracking.model_versions import all_versions
from pipelines.tracking.move_log import ADAPTER_TAG, Action, AliasMove, AliasPosition
from pipelines.tracking.open_decision import (
    DecisionResult,
    Grounds,
    OpenDecision,
    open_decision,
)
from pipelines.tracking.references import Reference, existing_model
from pipelines.tracking.registry import download_version
from pipelines.tracking.tag_names import tags_of


def promote(
    reference: Reference, grounds: Grounds, runs: Path, *, alias: str = CHAMPION
) -> DecisionResult:
    """Give a version an alias, by default champion.

    Raises:
        RegistryError: the version failed the gate, was rejected or retired, was compared with
            another champion, or has other files than were registered. `force` overrides all but
            the last.
    """
    check_alias(alias)
    with connect(runs, editing(reference.name)) as client:
        version = reference.resolve(client)
        verify_files(version)
        with open_decision(client, version, "promote", grounds) as decision:
            return decision.result(promote_open(decision, alias))


def promote_open(decision: OpenDecision, alias: str) -> list[AliasMove]:
    """Give the version of an open decision an alias; return the moves."""
    holder = registered_version(decision.client, decision.name, alias)
    if not decision.grounds.force:
        check_promotable(decision.version, holder if alias == CHAMPION else None)
    moves = []
    before = None if holder is None else AliasPosition.of(holder)
    if before != decision.position or decision.past.left_at(alias) != decision.position:
        moves.append(decision.move(alias, before, decision.position))
    if alias == CHAMPION and decision.position_of(PROPOSED) == decision.position:
        moves.append(decision.move(PROPOSED, decision.position, None))
    for tag in (REJECTED_TAG, RETIRED_TAG):
        if tag in decision.version.tags:
            number = decision.position.version
            decision.client.delete_model_version_tag(decision.name, number, tag)
    return moves


def reject(reference: Reference, grounds: Grounds, runs: Path) -> DecisionResult:
    """Take a version's aliases away; runs do not propose it again unless a user requests it.

    Raises:
        RegistryError: it is the champion, and `force` is not set.
    """
    return _withdraw(reference, grounds, runs, action="reject", tag=REJECTED_TAG)


def retire(reference: Reference, grounds: Grounds, runs: Path) -> DecisionResult:
    """Take a version's aliases away for good.

    Raises:
        RegistryError: it is the champion, and `force` is not set.
    """
    return _withdraw(reference, grounds, runs, action="retire", tag=RETIRED_TAG)


def rollback(name: str, grounds: Grounds, runs: Path, *, alias: str = CHAMPION) -> DecisionResult:
    """Move an alias back to the version that held it before.

    A version that was rolled back, deleted, rejected or retired since is skipped.

    Raises:
        RegistryError: no version held it before, or its files are not those registered.
    """
    check_alias(alias)
    with connect(runs, editing(name)) as client:
        past = History.of_tags(name, existing_model(client, name).tags)
        target = _earlier_holder(client, name, alias, past)
        verify_files(target)
        with open_decision(client, target, "rollback", grounds) as decision:
            again = _earlier_holder(client, name, alias, decision.past)
            if AliasPosition.of(again) != decision.position:
                raise RegistryError(
                    f"the alias {alias} of {name} was moved at the same time; run the command again"
                )
            holder = decision.position_of(alias)
            return decision.result([decision.move(alias, holder, decision.position)])


def verify_files(version: ModelVersion) -> None:
    """Download a version and compare its files with their digests.

    Raises:
        RegistryError: they differ.
    """
    with tempfile.TemporaryDirectory() as scratch:
        download_version(version, Path(scratch))


def check_alias(alias: str) -> None:
    """Raise RegistryError if MLflow cannot hold an alias of this name."""
    if not re.fullmatch(r"[\w-]{1,255}", alias) or re.fullmatch(r"(?i)v\d+|latest|\d+", alias):
        raise RegistryError(
            f"the alias {alias[:60]!r} must have letters, digits, '-' and '_' only, and must not "
            "be a number, 'latest' or like 'v1', which MLflow reserves; choose another"
        )


def _withdraw(
    reference: Reference, grounds: Grounds, runs: Path, *, action: Action, tag: str
) -> DecisionResult:
    with connect(runs, editing(reference.name)) as client:
        version = reference.resolve(client)
        with open_decision(client, version, action, grounds) as decision:
            number = decision.position.version
            if not grounds.force and decision.position_of(CHAMPION) == decision.position:
                raise RegistryError(
                    f"version {number} is the champion of {version.name}, which would have none; "
                    "promote another version or roll back first, or add --force"
                )
            # before the aliases: what has the tag gets no alias from a run
            client.set_model_version_tag(version.name, number, tag, "true")
            return decision.result(decision.withdraw_aliases())


def check_promotable(version: ModelVersion, champion: ModelVersion | None) -> None:
    """Raise RegistryError if the rules keep a version from replacing the champion.

    Args:
        version: of the champion's name, or of its candidates.
        champion: None if there is none, or if another alias is moved.
    """
    _refuse_unsuitable(version)
    if champion is not None:
        _refuse_uncompared(version, champion)


def _refuse_unsuitable(version: ModelVersion) -> None:
    """Raise RegistryError if a version did not pass the gate, or a person excluded it."""
    name = f"version {version.version} of {version.name}"
    verdict = version.tags.get("verdict", "not recorded")
    if verdict != "pass":
        raise RegistryError(
            f"the verdict on {name} is {verdict!r} ({tags_of(version).get('reason', '')[:200]}); "
            "promote a version that passes, or add --force with your reason"
        )
    if is_retired(version) or is_rejected(version):
        raise RegistryError(
            f"{name} was retired or rejected; `lora registry history {version.name}` prints why. "
            "Add --force with your reason to promote it again"
        )


def _refuse_uncompared(version: ModelVersion, champion: ModelVersion) -> None:
    """Raise RegistryError if a version was not compared with the present champion."""
    if champion.tags.get(ADAPTER_TAG) == version.tags.get(ADAPTER_TAG):
        return
    compared = tags_of(version).get(COMPARED_TAG, ANY_CHAMPION)
    comparison = tags_of(version).get("comparison")
    is_same_comparison = tags_of(champion).get("comparison") == comparison
    if is_same_comparison or compared in (ANY_CHAMPION, champion.tags.get(ADAPTER_TAG)):
        return
    raise RegistryError(
        f"version {version.version} of {version.name} was not compared with the champion, version "
        f"{champion.version} of {champion.name}; run its recipe again, which compares them, or add "
        "--force with your reason"
    )


def _earlier_holder(client: MlflowClient, name: str, alias: str, past: History) -> ModelVersion:
    """Return the version that held an alias before the one that holds it."""
    holder = registered_version(client, name, alias)
    current = None if holder is None else AliasPosition.of(holder)
    earlier = earlier_holders(past, alias, current, all_versions(client, name))
    if earlier:
        return earlier[0]
    raise RegistryError(
        f"{name} has no version to which the alias {alias} can return: no other version held it "
        "before, or each was rolled back, deleted, rejected or retired; `lora registry history "
        f"{name}` prints the moves. Promote a version instead"
    )
