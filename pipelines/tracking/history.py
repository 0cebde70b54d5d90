"""What the registry remembers of a registered model, so that human decisions persist.

Tags on the registered model:

    lora.move.NUMBER      a move of an alias by a run: who, when, from, to, why; append-only
    lora.version.SHA256   the version of the adapter with this digest; remains if it is deleted
    lora.propose.SHA256   a user's request to propose that adapter once more; set it to `true`

A tag on a version, `retired`, excludes it from the aliases; so does MLflow's stage Archived.

Nobody but a run records moves. If an alias is at another version than the last run left it, a user
moved it: the adapter that lost it is demoted, and no run moves the alias back to it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from pydantic import ValidationError

from pipelines.errors import RegistryError
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.lease import acting_user

ADAPTER_TAG = "adapter_sha256"
MOVE_TAG = "lora.move."
VERSION_TAG = "lora.version."
PROPOSE_TAG = "lora.propose."
RETIRED_TAG = "retired"
FLOW_RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""Set by Prefect's workers."""
MAX_REASON = 500


class AliasPosition(Values):
    """A version with an alias."""

    version: str
    adapter_sha256: str

    @classmethod
    def of(cls, version: ModelVersion) -> "AliasPosition":
        """Return the position of an alias at a version."""
        return cls(version=str(version.version), adapter_sha256=version.tags.get(ADAPTER_TAG, ""))


class AliasMove(Values):
    """A move of an alias by a run."""

    alias: str
    before: AliasPosition | None
    """None if no version had the alias."""
    after: AliasPosition
    time: str
    """In UTC, ISO 8601."""
    user: str
    flow_run: str
    """Id of the Prefect flow run; empty outside a worker."""
    reason: str


@dataclass(frozen=True)
class History:
    """What the tags of a registered model record."""

    moves: tuple[AliasMove, ...]
    """The first one first."""
    versions: Mapping[str, str]
    """Digest of an adapter → its version, which may have been deleted."""
    requested: frozenset[str]
    """Digests that a user wants to be proposed once more."""

    @classmethod
    def read(cls, client: MlflowClient, name: str) -> "History":
        """Read the history of a registered model, which exists."""
        tags = dict(client.get_registered_model(name).tags)
        moves = []
        versions = {}
        requested = set()
        for tag, value in sorted(tags.items()):
            if tag.startswith(MOVE_TAG):
                moves.append(_parsed_move(name, tag, value))
            elif tag.startswith(VERSION_TAG):
                versions[tag.removeprefix(VERSION_TAG)] = value
            elif tag.startswith(PROPOSE_TAG) and value.lower() == "true":
                requested.add(tag.removeprefix(PROPOSE_TAG))
        return cls(tuple(moves), versions, frozenset(requested))

    def last_move(self, alias: str) -> AliasMove | None:
        """Return the last move of an alias; None if no run has moved it."""
        moves = [move for move in self.moves if move.alias == alias]
        return moves[-1] if moves else None

    def demoted(self, alias: str, current: AliasPosition | None) -> set[str]:
        """Return the digests of the adapters from which users took an alias.

        Args:
            alias: its name.
            current: where it is now.
        """
        found: set[str] = set()
        left: AliasPosition | None = None
        for move in self.moves:
            if move.alias != alias:
                continue
            if left is not None and move.before != left:
                found.add(left.adapter_sha256)
            left = move.after
            found.discard(left.adapter_sha256)
        if left is not None and current != left:
            found.add(left.adapter_sha256)
        if current is not None:
            found.discard(current.adapter_sha256)
        return found


def _parsed_move(name: str, tag: str, value: str) -> AliasMove:
    try:
        return AliasMove.model_validate_json(value)
    except ValidationError as error:
        raise RegistryError(
            f"the tag {tag} of the registered model {name} is {value[:60]!r}, which is not a move "
            "of an alias as a run records it; delete the tag, or use the release that wrote it"
        ) from error


def record_version(client: MlflowClient, name: str, sha256: str, version: str) -> None:
    """Record the version of an adapter."""
    client.set_registered_model_tag(name, VERSION_TAG + sha256, version)


def record_move(client: MlflowClient, name: str, move: AliasMove, number: int) -> None:
    """Append a move; the caller has the lease on the name, and there are `number` moves so far."""
    client.set_registered_model_tag(name, f"{MOVE_TAG}{number:08d}", move.model_dump_json())


def clear_request(client: MlflowClient, name: str, sha256: str) -> None:
    """Remove a request, which counts for one run."""
    client.delete_registered_model_tag(name, PROPOSE_TAG + sha256)


def new_move(
    alias: str, before: AliasPosition | None, after: AliasPosition, reason: str
) -> AliasMove:
    """Return a move that this process makes now."""
    return AliasMove(
        alias=alias,
        before=before,
        after=after,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        user=acting_user(),
        flow_run=os.environ.get(FLOW_RUN_VARIABLE, ""),
        reason=reason[:MAX_REASON],
    )


def is_retired(version: ModelVersion) -> bool:
    """Return whether a user has retired a version."""
    tag = version.tags.get(RETIRED_TAG, "false").strip().lower()
    return tag not in ("", "false") or version.current_stage == "Archived"
