"""Item records: group those of one model, and check that two models scored the same items.

A record holds the result of one model on one item. Its `kind` is the type of the item:

    task          a held-out example: its loss
    generation    a prompt with a generated answer, and each metric of that answer
    general       a multiple-choice question
    answer        a question with a single answer
    score         a question that a task of lm-eval scores with its own metric
    text          a passage of plain text
    chat          a question formatted as a chat

A record with `left_out` holds the reason why its item could not be scored. Such an item is left out
for all models, and counted. Records with a `prompt_sha256` are the same item only if it is equal.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Records = Sequence[Record]
ABILITIES = ("general", "answer", "score")
"""Kinds that measure general abilities and belong to a benchmark."""
OPTIONAL = ("generation", "text", "chat")
"""Kinds that a model may lack."""
UNNAMED = {"task": "examples", "generation": "answers", "text": "passages", "chat": "chat"}
"""Kind → the name under which its records are counted if they name no benchmark."""


def scored(records: Records, *kinds: str) -> list[Record]:
    """Return the records of the given kinds, without those that were left out."""
    return [record for record in records if record["kind"] in kinds and "left_out" not in record]


def by_benchmark(records: Records, *kinds: str) -> dict[str, list[Record]]:
    """Return benchmark → its records of the given kinds, without those that were left out."""
    groups: dict[str, list[Record]] = {}
    for record in scored(records, *kinds):
        groups.setdefault(record["benchmark"], []).append(record)
    return groups


def left_out(records: Records) -> dict[str, int]:
    """Return benchmark → number of items left out, over all kinds, for benchmarks with any."""
    return _count_by_benchmark([record for record in records if "left_out" in record])


def unfinished(records: Records) -> dict[str, int]:
    """Return benchmark → number of answers that stopped at the maximum length; see `left_out`."""
    stopped = []
    for record in records:
        if record.get("ended") is False and "left_out" not in record:
            stopped.append(record)
    return _count_by_benchmark(stopped)


def align(items: Mapping[str, Records]) -> dict[str, list[Record]]:
    """Leave out for every model each item that was left out for one of them.

    Raises:
        ValueError: two models were not scored on the same items in the same order.
    """
    first = next(iter(items.values()))
    reasons: dict[Any, str] = {}
    for records in items.values():
        check_paired(first, records)
        for record in records:
            if "left_out" in record:
                reasons[_identity(record)] = record["left_out"]
    aligned = {}
    for label, records in items.items():
        aligned[label] = [_with_reason(record, reasons) for record in records]
    return aligned


def check_paired(before: Records, after: Records) -> None:
    """Raise ValueError if two models were not scored on the same items in the same order.

    A model that only the frontier shows may lack answers, texts and chats; what both have must be
    the same.
    """
    unshared = _kinds(before) ^ _kinds(after)
    first = _identities(before, except_kinds=unshared)
    second = _identities(after, except_kinds=unshared)
    if first != second or not unshared <= set(OPTIONAL):
        raise ValueError(
            "the two models were scored on different items; "
            "score both with the same seed and settings"
        )


def _count_by_benchmark(records: Records) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for record in records:
        name = record.get("benchmark") or UNNAMED[record["kind"]]
        counts[name] += 1
    return dict(counts)


def _kinds(records: Records) -> set[str]:
    return {record["kind"] for record in records}


def _identities(records: Records, *, except_kinds: set[str]) -> list[tuple[Any, ...]]:
    return [_identity(record) for record in records if record["kind"] not in except_kinds]


def _identity(record: Record) -> tuple[Any, ...]:
    """Return what identifies an item: kind, id and, if there is a prompt, its digest."""
    return record["kind"], record["id"], record.get("prompt_sha256")


def _with_reason(record: Record, reasons: Mapping[Any, str]) -> Record:
    reason = reasons.get(_identity(record))
    if reason is None:
        return record
    return {**record, "left_out": reason}
