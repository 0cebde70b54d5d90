"""Item records: group those of one model, and check that two models scored the same items.

An item that one model could not score is left out for all models, and counted; see `record_types`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pipelines.comparison.record_types import (
    AbilityRecord,
    BenchmarkRecord,
    ChoiceRecord,
    GenerationRecord,
    ItemRecord,
    LeftOutRecord,
    ScoreRecord,
    SingleAnswerRecord,
    TaskRecord,
)

Records = Sequence[ItemRecord]
AnyRecord = TypeVar("AnyRecord", bound=ItemRecord)
Ability = TypeVar("Ability", bound=AbilityRecord)
Identity = tuple[str, int | str, str]
"""Kind, id and digest of the prompt."""
ABILITIES = (ChoiceRecord, SingleAnswerRecord, ScoreRecord)
"""The records of items that measure general abilities."""
ABILITY_KINDS = tuple(record.kind for record in ABILITIES)
OPTIONAL_KINDS = ("generation", "text", "chat")
"""Kinds that a model may lack."""


def of_type(records: Records, *types: type[AnyRecord]) -> list[AnyRecord]:
    """Return the records of the given types; those of left-out items have another type."""
    return [record for record in records if isinstance(record, types)]


def by_benchmark(records: Records, *types: type[Ability]) -> dict[str, list[Ability]]:
    """Return benchmark → its records of the given types."""
    groups: dict[str, list[Ability]] = {}
    for record in of_type(records, *types):
        groups.setdefault(record.benchmark, []).append(record)
    return groups


def ability_benchmarks(records: Records) -> list[str]:
    """Return the benchmarks of general abilities, also those whose items were all left out."""
    names: dict[str, None] = {}
    for record in records:
        if isinstance(record, BenchmarkRecord) and record.kind in ABILITY_KINDS:
            names[record.benchmark] = None
    return list(names)


def left_out(records: Records) -> dict[str, int]:
    """Return benchmark → number of items left out, over all kinds, for benchmarks with any."""
    return dict(Counter(record.benchmark for record in of_type(records, LeftOutRecord)))


def unfinished(records: Records) -> dict[str, int]:
    """Return benchmark → number of answers that stopped at the maximum length; see `left_out`."""
    answers: list[GenerationRecord | ScoreRecord]
    answers = of_type(records, GenerationRecord, ScoreRecord)
    return dict(Counter(answer.benchmark for answer in answers if answer.ended is False))


def align(items: Mapping[str, Records]) -> dict[str, list[ItemRecord]]:
    """Leave out for every model each item that was left out for one of them.

    Raises:
        ValueError: two models were not scored on the same items in the same order.
    """
    first = next(iter(items.values()))
    reasons: dict[Identity, str] = {}
    for records in items.values():
        check_paired(first, records)
        for record in of_type(records, LeftOutRecord):
            reasons[_identity(record)] = record.left_out
    aligned = {}
    for label, records in items.items():
        aligned[label] = [_with_reason(record, reasons) for record in records]
    return aligned


def check_paired(before: Records, after: Records) -> None:
    """Raise ValueError if two models were not scored on the same items in the same order.

    A model that only the frontier shows may lack answers, texts and chats; what both have must be
    the same.

    Args:
        before: records of one model.
        after: records of another.

    Raises:
        ValueError: an item, its prompt or the order differs.
    """
    unshared = _kinds(before) ^ _kinds(after)
    first = _identities(before, except_kinds=unshared)
    second = _identities(after, except_kinds=unshared)
    if first != second or not unshared <= set(OPTIONAL_KINDS):
        raise ValueError(
            "the two models were scored on different items; "
            "score both with the same seed and settings"
        )


def _kinds(records: Records) -> set[str]:
    return {record.kind for record in records}


def _identities(records: Records, *, except_kinds: set[str]) -> list[Identity]:
    return [_identity(record) for record in records if record.kind not in except_kinds]


def _identity(record: ItemRecord) -> Identity:
    return record.kind, record.id, record.prompt_sha256


def _with_reason(record: ItemRecord, reasons: Mapping[Identity, str]) -> ItemRecord:
    reason = reasons.get(_identity(record))
    if reason is None:
        return record
    assert not isinstance(record, TaskRecord), "held-out examples are never left out"
    return LeftOutRecord(
        kind=record.kind,
        id=record.id,
        benchmark=record.benchmark,
        prompt_sha256=record.prompt_sha256,
        left_out=reason,
    )
