"""A decision that a person makes about a version: its grounds, its moves, its log entries."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipelines.errors import RegistryError
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.aliases import registered_version, set_alias
from pipelines.tracking.history import History
from pipelines.tracking.lease import hold_lease
from pipelines.tracking.move_log import (
    MAX_REASON,
    Action,
    AliasMove,
    AliasPosition,
    MoveLog,
    MoveScores,
)
from pipelines.tracking.references import aliases_of


@dataclass(frozen=True)
class Grounds:
    """Why a person decides, and whether the rules are overridden."""

    reason: str
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty reason, and one that the log cannot hold."""
        length = len(self.reason.strip())
        if not length or length > MAX_REASON:
            raise RegistryError(
                f"the reason has {length} characters, and the log holds 1 to {MAX_REASON}; state "
                "with --reason why you decide this"
            )


class DecisionResult(Values):
    """What a decision changed."""

    action: Action
    name: str
    version: str
    """That the decision is about."""
    adapter_sha256: str
    moves: tuple[AliasMove, ...]
    """Entries of the log that were added; empty if nothing had to change."""


@dataclass(frozen=True)
class OpenDecision:
    """A decision that is being made, under the lease on the name."""

    client: MlflowClient
    version: ModelVersion
    past: History
    log: MoveLog
    action: Action
    grounds: Grounds

    @property
    def name(self) -> str:
        """Name of the registered model."""
        return str(self.version.name)

    @property
    def position(self) -> AliasPosition:
        """The version that the decision is about."""
        return AliasPosition.of(self.version)

    def move(
        self, alias: str, before: AliasPosition | None, after: AliasPosition | None
    ) -> AliasMove:
        """Move an alias, and append the move to the log."""
        set_alias(self.client, self.name, alias, before=before, after=after)
        return self.record(alias, before, after)

    def record(
        self, alias: str, before: AliasPosition | None, after: AliasPosition | None
    ) -> AliasMove:
        """Append a move to the log."""
        return self.log.record(
            alias,
            before,
            after,
            reason=self.grounds.reason.strip(),
            scores=MoveScores.of(self.version),
            action=self.action,
        )

    def position_of(self, alias: str) -> AliasPosition | None:
        """Return where an alias is now."""
        version = registered_version(self.client, self.name, alias)
        return None if version is None else AliasPosition.of(version)

    def withdraw_aliases(self) -> list[AliasMove]:
        """Remove every alias of the version."""
        moves = []
        for alias, held in sorted(aliases_of(self.client, self.name).items()):
            if held == self.position.version:
                moves.append(self.move(alias, self.position, None))
        return moves or [self.record("", self.position, None)]

    def result(self, moves: list[AliasMove]) -> DecisionResult:
        """Return what the decision changed."""
        return DecisionResult(
            action=self.action,
            name=self.name,
            version=self.position.version,
            adapter_sha256=self.position.adapter_sha256,
            moves=tuple(moves),
        )


@contextmanager
def open_decision(
    client: MlflowClient, version: ModelVersion, action: Action, grounds: Grounds
) -> Iterator[OpenDecision]:
    """Yield a decision about a version, as it is now that the name is leased."""
    name = version.name
    with hold_lease(client, name):
        current = client.get_model_version(name, str(version.version))
        if AliasPosition.of(current) != AliasPosition.of(version):
            raise RegistryError(
                f"version {version.version} of {name} was changed at the same time; run the "
                "command again"
            )
        past = History.read(client, name)
        yield OpenDecision(client, current, past, past.log(client, name), action, grounds)
