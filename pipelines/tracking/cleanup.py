"""Versions that nobody needs any more: retired, rejected or superseded, and without an alias."""

from collections.abc import Sequence
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from pipelines.config.alias_names import CHAMPION
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.catalog import decision_on
from pipelines.tracking.connection import connect, editing, reading
from pipelines.tracking.history import History, earlier_holders
from pipelines.tracking.lease import hold_lease
from pipelines.tracking.model_versions import all_versions
from pipelines.tracking.move_log import AliasPosition, MoveScores
from pipelines.tracking.references import existing_model


class UnusedVersion(Values):
    """A version without an alias that can be deleted."""

    version: str
    adapter_sha256: str
    why: str


def unused_versions(name: str, runs: Path, *, keep: int = 1) -> list[UnusedVersion]:
    """Return the versions that can be deleted.

    Args:
        name: the registered model.
        runs: folder of all runs.
        keep: how many former champions a rollback must be able to return to.
    """
    with connect(runs, reading(name)) as client:
        model = existing_model(client, name)
        return _unused(model, all_versions(client, name), keep)


def delete_unused(name: str, runs: Path, *, keep: int = 1) -> list[UnusedVersion]:
    """Delete the versions that `unused_versions` returns, and append it to the log.

    A version's digest remains known, so that no run registers it again. The files remain in the
    MLflow run that registered it.
    """
    with connect(runs, editing(name)) as client:
        existing_model(client, name)  # only an existing name can be leased
        with hold_lease(client, name) as lease:
            model = existing_model(client, name)
            versions = {str(version.version): version for version in all_versions(client, name)}
            log = History.of_tags(name, model.tags).log(client, name)
            unused = _unused(model, list(versions.values()), keep)
            for one in unused:
                lease.renew()
                version = versions[one.version]
                client.delete_model_version(name, one.version)
                log.record(
                    "",
                    AliasPosition.of(version),
                    None,
                    reason=one.why,
                    scores=MoveScores.of(version),
                    action="delete",
                )
            return unused


def _unused(
    model: RegisteredModel, versions: Sequence[ModelVersion], keep: int
) -> list[UnusedVersion]:
    """Return the versions of a registered model that can be deleted."""
    with_alias = {str(version) for version in model.aliases.values()}
    champion = model.aliases.get(CHAMPION)
    former = _former_champions(model, versions)[:keep]
    unused = []
    for version in versions:
        position = AliasPosition.of(version)
        why: str = decision_on(version)
        is_superseded = champion is not None and int(version.version) < int(champion)
        if not why and is_superseded and position not in former:
            why = f"superseded by version {champion}, the champion"
        if why and position.version not in with_alias:
            unused.append(
                UnusedVersion(
                    version=position.version, adapter_sha256=position.adapter_sha256, why=why
                )
            )
    return unused


def _former_champions(
    model: RegisteredModel, versions: Sequence[ModelVersion]
) -> list[AliasPosition]:
    """Return the versions to which the champion can be rolled back, the latest one first."""
    current = None
    for version in versions:
        if str(version.version) == str(model.aliases.get(CHAMPION)):
            current = AliasPosition.of(version)
    past = History.of_tags(model.name, model.tags)
    held = earlier_holders(past, CHAMPION, current, versions)
    return [AliasPosition.of(version) for version in held]
