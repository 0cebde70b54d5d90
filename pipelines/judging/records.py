"""Item records: what of one model belongs together, and whether two models answered the same questions.

A record says what one model did with one item; its `kind` says what was asked:

    task          a held-out example: its loss
    generation    a prompt that was answered, with each metric of the answer
    general       a question with choices; answer: one with a single answer; score: one that a task of lm-eval rates itself
    text          a passage of plain text; chat: a question put as a chat

A record with `left_out` says why its item could not be scored. It is left out for all models alike, and counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Records = Sequence[Record]
ABILITIES = ("general", "answer", "score")
"""Kinds that ask for general abilities and belong to a benchmark."""


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
    """Return how many items of each benchmark were left out; a benchmark that lost none is not named."""
    counts: dict[str, int] = {}
    for record in records:
        if "left_out" in record:
            counts[record["benchmark"]] = counts.get(record["benchmark"], 0) + 1
    return counts


def align(items: Mapping[str, Records]) -> dict[str, list[Record]]:
    """Leave out for every model what was left out for one of them.

    Raises:
        ValueError: two models were not scored on the same items in the same order.
    """
    first = next(iter(items.values()))
    for records in items.values():
        check_paired(first, records)
    reasons = _reasons(items.values())
    return {
        label: [{**record, "left_out": reasons[place]} if place in reasons else record for place, record in enumerate(records)]
        for label, records in items.items()
    }


def check_paired(before: Records, after: Records) -> None:
    """Raise ValueError where two models were not scored on the same items in the same order."""
    if [_identity(record) for record in before] != [_identity(record) for record in after]:
        raise ValueError("the two models were scored on different items; score both with the same seed and settings")


def _identity(record: Record) -> tuple[Any, ...]:
    """Return what an item is known by: where a prompt was put, also by its digest."""
    return record["kind"], record["id"], record.get("prompt_sha256")


def _reasons(models: Iterable[Records]) -> dict[int, str]:
    """Return why an item was left out, under its place."""
    return {place: record["left_out"] for records in models for place, record in enumerate(records) if "left_out" in record}
