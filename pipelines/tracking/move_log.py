"""The log of a registered model: every move of an alias, by a run or by a person.

Each entry is a tag on the registered model, `lora.move.NUMBER`, which is written once and never
changed. An entry contains the digest of the entry before it, and the tag `lora.log` has that of the
last one, so that an entry that was changed or removed later is detected.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipelines.errors import RegistryError
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.lease import acting_user

ADAPTER_TAG = "adapter_sha256"
MOVE_TAG = "lora.move."
LAST_ENTRY_TAG = "lora.log"
MAX_REASON = 500
Action = Literal["run", "promote", "reject", "rollback", "retire", "delete"]


class AliasPosition(Values):
    """A version with an alias."""

    version: str
    adapter_sha256: str

    @classmethod
    def of(cls, version: ModelVersion) -> "AliasPosition":
        """Return the position of an alias at a version."""
        return cls(version=str(version.version), adapter_sha256=version.tags.get(ADAPTER_TAG, ""))


class MoveScores(Values):
    """What was known about a version when its alias moved."""

    verdict: str
    task_gain: float | None
    """Nats per token over the base."""
    general_change: float | None

    @classmethod
    def of(cls, version: ModelVersion) -> "MoveScores":
        """Return the scores in the tags of a version."""
        tags = version.tags
        return cls(
            verdict=tags.get("verdict", ""),
            task_gain=number_in(tags, "task_gain"),
            general_change=number_in(tags, "general_change"),
        )


class AliasMove(Values):
    """A move of an alias, or a decision about a version without one."""

    alias: str
    """Empty if the version had no alias."""
    before: AliasPosition | None
    """None if no version had the alias."""
    after: AliasPosition | None
    """None if the alias was removed, or the version had none."""
    time: str
    """In UTC, ISO 8601."""
    user: str
    flow_run: str
    """Id of the Prefect flow run; empty if a person moved it."""
    reason: str
    action: Action = "run"
    """What moved it: a run, or a command of a person."""
    scores: MoveScores | None = None
    """Of the version that gets the alias, or of the one that loses it."""
    previous: str = ""
    """Digest of the entry before this one; empty for the first, and in entries of earlier
    releases."""

    @property
    def is_by_a_person(self) -> bool:
        """Whether a person decided it."""
        return self.action != "run"


@dataclass(frozen=True)
class LogEntry:
    """A move, as it is stored."""

    number: int
    text: str
    """The value of the tag."""
    move: AliasMove


@dataclass
class MoveLog:
    """Appends to the log; the caller has the lease on the name."""

    client: MlflowClient
    name: str
    entries: list[LogEntry]
    flow_run: str = ""
    """Id of the Prefect flow run that appends; empty if a person does."""

    def record(
        self,
        alias: str,
        before: AliasPosition | None,
        after: AliasPosition | None,
        *,
        reason: str,
        scores: MoveScores,
        action: Action = "run",
    ) -> AliasMove:
        """Append a move that this process made now; return it as it is written."""
        last = self.entries[-1] if self.entries else None
        move = AliasMove(
            alias=alias,
            before=before,
            after=after,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            user=acting_user(),
            flow_run=self.flow_run,
            reason=reason[:MAX_REASON],
            action=action,
            scores=scores,
            previous="" if last is None else digest_of_entry(last.text),
        )
        number = 0 if last is None else last.number + 1
        text = move.model_dump_json()
        self.client.set_registered_model_tag(self.name, f"{MOVE_TAG}{number:08d}", text)
        self.client.set_registered_model_tag(self.name, LAST_ENTRY_TAG, digest_of_entry(text))
        self.entries.append(LogEntry(number, text, move))
        return move


def read_entries(name: str, tags: Mapping[str, str]) -> list[LogEntry]:
    """Return the log in the tags of a registered model, the first entry first.

    Raises:
        RegistryError: a tag is not an entry.
    """
    entries = []
    for tag in sorted(tags):
        if tag.startswith(MOVE_TAG):
            entries.append(_parsed_entry(name, tag, tags[tag]))
    return entries


def broken_links(tags: Mapping[str, str], entries: Sequence[LogEntry]) -> list[str]:
    """Return what is wrong with a log: gaps, and entries that do not follow each other.

    Args:
        tags: of the registered model.
        entries: the log in them.
    """
    problems = []
    previous = ""
    for index, entry in enumerate(entries):
        if entry.number != index:
            problems.append(f"entry {index} is missing")
            return problems
        if entry.move.previous != previous and (entry.move.previous or _is_linked(entries[:index])):
            problems.append(f"entry {index} does not follow the one before it")
        previous = digest_of_entry(entry.text)
    last = tags.get(LAST_ENTRY_TAG)
    if last != previous and (last is not None or _is_linked(entries)):
        problems.append(f"the last entry is not the one that the tag {LAST_ENTRY_TAG} records")
    return problems


def _is_linked(entries: Sequence[LogEntry]) -> bool:
    """Return whether one of the entries refers to the one before it; earlier releases did not."""
    return any(entry.move.previous for entry in entries)


def number_in(tags: Mapping[str, str], name: str) -> float | None:
    """Return the number in a tag; None if there is none."""
    try:
        return float(tags[name])
    except (KeyError, ValueError):
        return None


def digest_of_entry(text: str) -> str:
    """Return the digest by which the next entry refers to an entry."""
    return hashlib.sha256(text.encode()).hexdigest()


def _parsed_entry(name: str, tag: str, value: str) -> LogEntry:
    try:
        return LogEntry(
            int(tag.removeprefix(MOVE_TAG)), value, AliasMove.model_validate_json(value)
        )
    except ValueError as error:  # pydantic's ValidationError is one
        raise RegistryError(
            f"the tag {tag} of the registered model {name} is {value[:60]!r}, which is not a move "
            "of an alias as a run records it; delete the tag, or use the release that wrote it"
        ) from error
