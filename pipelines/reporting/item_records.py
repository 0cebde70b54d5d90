"""What the page takes from the item files: sample answers, and the items that were left out."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.comparison.comparison import BASE, QUANTIZED_BASE
from pipelines.comparison.document import Summary
from pipelines.comparison.record_files import read_items
from pipelines.comparison.record_types import GenerationRecord, LeftOutRecord
from pipelines.comparison.records import of_type

MAX_SAMPLES = 4
MAX_REASONS = 2
"""How many reasons are listed for the left-out items of one benchmark."""
Item = tuple[str, int | str]
"""Kind and id."""
Reasons = dict[Item, str]
"""Item → why it was left out."""


@dataclass(frozen=True)
class LeftOut:
    """The items of one benchmark that were left out for all models."""

    name: str
    count: int
    why: str
    """The first reasons; empty if they are unknown."""


def left_out(summary: Summary) -> list[LeftOut]:
    """Return what was left out for all models, by benchmark."""
    counted = _left_out_counts(summary)
    reasons = _left_out_reasons(summary)
    rows = []
    for name in dict.fromkeys([*counted, *reasons]):
        by_item = reasons.get(name, {})
        distinct = list(dict.fromkeys(by_item.values()))
        count = len(by_item) or counted[name]
        rows.append(LeftOut(name, count, _join_reasons(distinct)))
    return rows


def _left_out_counts(summary: Summary) -> dict[str, int]:
    """Return how many items of each benchmark were left out, from the scores of the base."""
    counts = {}
    for name, scores in summary.models[BASE].scores.benchmarks.items():
        if scores.left_out:
            counts[name] = scores.left_out
    return counts


def _left_out_reasons(summary: Summary) -> dict[str, Reasons]:
    """Return the reasons by benchmark, from the records of all models."""
    reasons: dict[str, Reasons] = {}
    for path in summary.items.values():
        for record in of_type(read_items(Path(path)), LeftOutRecord):
            by_item = reasons.setdefault(record.benchmark, {})
            by_item[record.kind, record.id] = record.left_out
    return reasons


def _join_reasons(reasons: list[str]) -> str:
    parts = reasons[:MAX_REASONS]
    more = len(reasons) - MAX_REASONS
    if more > 0:
        parts.append(f"and {more} more like it")
    return "; ".join(parts)


def samples(summary: Summary) -> list[dict[str, GenerationRecord]]:
    """Return the first prompts that every model answered: for each, label → answer."""
    answers: dict[str, dict[int, GenerationRecord]] = {}
    for label in summary.models:
        if label != QUANTIZED_BASE and label in summary.items:
            answers[label] = _answers(Path(summary.items[label]))
    if not answers:
        return []
    shared = set.intersection(*map(set, answers.values()))
    rows = []
    for item in sorted(shared)[:MAX_SAMPLES]:
        rows.append({label: by_item[item] for label, by_item in answers.items()})
    return rows


def _answers(path: Path) -> dict[int, GenerationRecord]:
    """Return the answers of one model by item id, without those that were left out."""
    return {answer.id: answer for answer in of_type(read_items(path), GenerationRecord)}
