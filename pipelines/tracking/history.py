"""What the registry remembers of a registered model, so that human decisions persist.

Tags on the registered model:

    lora.move.NUMBER      a move of an alias: who, when, from, to, why; see move_log.py
    lora.version.SHA256   the version of the adapter with this digest; remains if it is deleted
    lora.propose.SHA256   a user's request to propose that adapter once more; set it to `true`

A tag on a version, `retired`, excludes it from the aliases; so does MLflow's stage Archived. The
tag `rejected` does, too, until the adapter is requested.

If an alias is at another version than the log's last move left it, a user moved it by hand. As if
a command had moved it, the adapter that lost it is demoted, and no run moves the alias back to it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipelines.tracking.move_log import (
    AliasMove,
    AliasPosition,
    LogEntry,
    MoveLog,
    read_entries,
)

VERSION_TAG = "lora.version."
PROPOSE_TAG = "lora.propose."
RETIRED_TAG = "retired"
REJECTED_TAG = "rejected"


@dataclass(frozen=True)
class History:
    """What the tags of a registered model record."""

    entries: tuple[LogEntry, ...]
    """The log, the first entry first."""
    versions: Mapping[str, str]
    """Digest of an adapter → its version, which may have been deleted."""
    requested: frozenset[str]
    """Digests that a user wants to be proposed once more."""

    @classmethod
    def read(cls, client: MlflowClient, name: str) -> "History":
        """Read the history of a registered model, which exists."""
        return cls.of_tags(name, client.get_registered_model(name).tags)

    @classmethod
    def of_tags(cls, name: str, tags: Mapping[str, str]) -> "History":
        """Return the history in the tags of a registered model."""
        versions = {}
        requested = set()
        for tag, value in sorted(tags.items()):
            if tag.startswith(VERSION_TAG):
                versions[tag.removeprefix(VERSION_TAG)] = value
            elif tag.startswith(PROPOSE_TAG) and value.lower() == "true":
                requested.add(tag.removeprefix(PROPOSE_TAG))
        return cls(tuple(read_entries(name, tags)), versions, frozenset(requested))

    @property
    def moves(self) -> tuple[AliasMove, ...]:
        """The moves, the first one first."""
        return tuple(entry.move for entry in self.entries)

    def log(self, client: MlflowClient, name: str, flow_run: str = "") -> MoveLog:
        """Return the log, to append to it.

        Args:
            client: of the registry.
            name: of the registered model.
            flow_run: id of the Prefect flow run that appends; empty if a person does.
        """
        return MoveLog(client, name, list(self.entries), flow_run)

    def left_at(self, alias: str) -> AliasPosition | None:
        """Return where the last move left an alias; None if it removed it or there is none."""
        moves = self._moves_of(alias)
        return moves[-1].after if moves else None

    def demoted(self, alias: str, current: AliasPosition | None) -> set[str]:
        """Return the digests of the adapters from which users took an alias.

        Args:
            alias: its name.
            current: where it is now.
        """
        found: set[str] = set()
        left: AliasPosition | None = None
        for move in self._moves_of(alias):
            if left is not None and move.before != left:
                found.add(left.adapter_sha256)
            if move.is_by_a_person and move.before is not None:
                found.add(move.before.adapter_sha256)
            left = move.after
            if left is not None:
                found.discard(left.adapter_sha256)
        if left is not None and current != left:
            found.add(left.adapter_sha256)
        if current is not None:
            found.discard(current.adapter_sha256)
        return found

    def holders(self, alias: str, current: AliasPosition | None) -> list[AliasPosition]:
        """Return the versions that hold an alias and held it before, without those rolled back.

        Args:
            alias: its name.
            current: where it is now; the last one, unless it is None.
        """
        stack: list[AliasPosition] = []
        for move in self._moves_of(alias):
            if move.before is not None and (not stack or stack[-1] != move.before):
                stack.append(move.before)  # moved there by hand
            if move.action == "rollback":
                while stack and stack[-1] != move.after:
                    stack.pop()
            if move.after is not None and (not stack or stack[-1] != move.after):
                stack.append(move.after)
        if current is not None and (not stack or stack[-1] != current):
            stack.append(current)
        return stack

    def _moves_of(self, alias: str) -> list[AliasMove]:
        return [move for move in self.moves if move.alias == alias]


def earlier_holders(
    past: History,
    alias: str,
    current: AliasPosition | None,
    versions: Iterable[ModelVersion],
) -> list[ModelVersion]:
    """Return the versions to which an alias can return, the latest holder first.

    They held it before, and were not rolled back, deleted, rejected or retired since.

    Args:
        past: the history of the registered model.
        alias: its name.
        current: where it is now; None if it is nowhere.
        versions: of the registered model, those that exist.
    """
    usable = {}
    for version in versions:
        if not is_retired(version) and not is_rejected(version):
            usable[AliasPosition.of(version)] = version
    held = dict.fromkeys(reversed(past.holders(alias, current)))
    return [usable[position] for position in held if position != current and position in usable]


def record_version(client: MlflowClient, name: str, sha256: str, version: str) -> None:
    """Record the version of an adapter."""
    client.set_registered_model_tag(name, VERSION_TAG + sha256, version)


def clear_request(client: MlflowClient, name: str, sha256: str) -> None:
    """Remove a request, which counts for one run."""
    client.delete_registered_model_tag(name, PROPOSE_TAG + sha256)


def is_retired(version: ModelVersion) -> bool:
    """Return whether a user has retired a version."""
    return _is_set(version, RETIRED_TAG) or version.current_stage == "Archived"


def is_rejected(version: ModelVersion) -> bool:
    """Return whether a user has rejected a version."""
    return _is_set(version, REJECTED_TAG)


def _is_set(version: ModelVersion, tag: str) -> bool:
    return version.tags.get(tag, "false").strip().lower() not in ("", "false")
