"""Item records: what of one model belongs together, and whether two models answered the same questions.

A record says what one model did with one item; its `kind` says what was asked:

    task          a held-out example: its loss
    generation    a prompt that was answered, with each metric of the answer
    general       a question with choices; answer: one with a single answer; score: one that a task of lm-eval rates itself
    text          a passage of plain text; chat: a question put as a chat

A record with `left_out` says why its item could not be scored. It is left out for all models alike, and counted. One that is
known by `prompt_sha256` as well is the same item only where that is the same.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Records = Sequence[Record]
ABILITIES = ("general", "answer", "score")
"""Kinds that ask for general abilities and belong to a benchmark."""
OPTIONAL = ("generation", "text", "chat")
"""Kinds that a model need not have answered."""
UNNAMED = {"task": "examples", "generation": "answers", "text": "passages", "chat": "chat"}
"""Under what name records are counted that name no benchmark."""


def scored(records: Records, *kinds: str) -> list[Record]:
    """Return the records of some kinds, without those that were left out."""
    return [record for record in records if record["kind"] in kinds and "left_out" not in record]


def by_benchmark(records: Records, *kinds: str) -> dict[str, list[Record]]:
    """Return the records of some kinds under the names of their benchmarks, without those that were left out."""
    groups: dict[str, list[Record]] = {}
    for record in scored(records, *kinds):
        groups.setdefault(record["benchmark"], []).append(record)
    return groups


def left_out(records: Records) -> dict[str, int]:
    """Return how many items of each benchmark were left out, of whatever kind; a benchmark that lost none is not named."""
    return _counts([record for record in records if "left_out" in record])


def unfinished(records: Records) -> dict[str, int]:
    """Return how many answers of each benchmark stopped only because they reached the longest length; see `left_out`."""
    return _counts(
        [record for record in records if record.get("ended") is False and "left_out" not in record]
    )


def align(items: Mapping[str, Records]) -> dict[str, list[Record]]:
    """Leave out for every model what was left out for one of them.

    Raises:
        ValueError: two models were not scored on the same items in the same order.
    """
    first = next(iter(items.values()))
    for records in items.values():
        check_paired(first, records)
    reasons = {
        _identity(record): record["left_out"]
        for records in items.values()
        for record in records
        if "left_out" in record
    }
    return {
        label: [_with_reason(record, reasons) for record in records]
        for label, records in items.items()
    }


def check_paired(before: Records, after: Records) -> None:
    """Raise ValueError where two models were not scored on the same items in the same order.

    A model that only the picture shows may lack answers, texts and chats; what both have must be the same.
    """
    lacking = {record["kind"] for record in before} ^ {record["kind"] for record in after}
    first, second = (
        [_identity(record) for record in records if record["kind"] not in lacking]
        for records in (before, after)
    )
    if first != second or not lacking <= set(OPTIONAL):
        raise ValueError(
            "the two models were scored on different items; score both with the same seed and settings"
        )


def _counts(records: Records) -> dict[str, int]:
    return dict(Counter(record.get("benchmark") or UNNAMED[record["kind"]] for record in records))


def _identity(record: Record) -> tuple[Any, ...]:
    """Return what an item is known by: where a prompt was put, also by its digest."""
    return record["kind"], record["id"], record.get("prompt_sha256")


def _with_reason(record: Record, reasons: Mapping[Any, str]) -> Record:
    reason = reasons.get(_identity(record))
    return record if reason is None else {**record, "left_out": reason}
