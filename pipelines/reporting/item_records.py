"""What the page takes from the item files: sample answers, and the items that were left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from pipelines.comparison.comparison import BASE, QUANTIZED_BASE
from pipelines.comparison.document import Summary
from pipelines.comparison.records import UNNAMED, scored
from pipelines.runtime.stage import read_records

MAX_SAMPLES = 4
MAX_REASONS = 2
"""How many reasons are listed for the left-out items of one benchmark or kind."""
Item = tuple[str, int | str]
"""Kind and id."""
Reasons = dict[Item, str]
"""Item → why it was left out."""


@dataclass(frozen=True)
class LeftOut:
    """The items of one benchmark or kind that were left out for all models."""

    name: str
    count: int
    why: str
    """The first reasons; empty if they are unknown."""


@dataclass(frozen=True)
class SkippedItem:
    """The record of an item that was left out."""

    kind: str
    id: int | str
    left_out: str
    """The reason."""
    benchmark: str | None = None

    @property
    def name(self) -> str:
        """Its benchmark, or what it is counted as."""
        return self.benchmark or UNNAMED[self.kind]


@dataclass(frozen=True)
class ShownAnswer:
    """A model's answer to a held-out prompt."""

    id: int
    """Of the prompt."""
    prompt: str
    reference: str
    answer: str
    ended: bool
    """Whether it ended before the maximum length."""
    metrics: Mapping[str, float | None]
    errors: Mapping[str, str]
    """Metric → why it could not be computed."""


SKIPPED_ITEM = TypeAdapter(SkippedItem)
ANSWER = TypeAdapter(ShownAnswer)


def left_out(summary: Summary) -> list[LeftOut]:
    """Return what was left out for all models, by benchmark or kind."""
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
    """Return the reasons by benchmark or kind, from the records of all models."""
    reasons: dict[str, Reasons] = {}
    for path in summary.items.values():
        for record in read_records(Path(path)):
            if "left_out" in record:
                item = SKIPPED_ITEM.validate_python(record)
                by_item = reasons.setdefault(item.name, {})
                by_item[item.kind, item.id] = item.left_out
    return reasons


def _join_reasons(reasons: list[str]) -> str:
    parts = reasons[:MAX_REASONS]
    more = len(reasons) - MAX_REASONS
    if more > 0:
        parts.append(f"and {more} more like it")
    return "; ".join(parts)


def samples(summary: Summary) -> list[dict[str, ShownAnswer]]:
    """Return the first prompts that every model answered: for each, label → answer."""
    answers: dict[str, dict[int, ShownAnswer]] = {}
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


def _answers(path: Path) -> dict[int, ShownAnswer]:
    """Return the answers of one model by item id, without those that were left out."""
    answers = {}
    for record in scored(read_records(path), "generation"):
        answer = ANSWER.validate_python(record)
        answers[answer.id] = answer
    return answers
