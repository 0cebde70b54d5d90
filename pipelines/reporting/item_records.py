"""What the page takes from the item files: sample answers, and the items that were left out."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.comparison.comparison import BASE, QUANTIZED_BASE
from pipelines.comparison.records import UNNAMED

MAX_SAMPLES = 4
MAX_REASONS = 2
"""How many reasons are listed for the left-out items of one benchmark or kind."""
Summary = Mapping[str, Any]
Record = dict[str, Any]
Reasons = dict[tuple[str, Any], str]
"""Kind and id of an item → why it was left out."""


def left_out(summary: Summary) -> list[dict[str, Any]]:
    """Return what was left out for all models, by benchmark or kind: name, count and reasons."""
    counted = _left_out_counts(summary)
    reasons = _left_out_reasons(summary)
    rows = []
    for name in dict.fromkeys([*counted, *reasons]):
        by_item = reasons.get(name, {})
        distinct = list(dict.fromkeys(by_item.values()))
        rows.append(
            {
                "name": name,
                "count": len(by_item) or counted[name],
                "why": _join_reasons(distinct),
            }
        )
    return rows


def _left_out_counts(summary: Summary) -> dict[str, int]:
    """Return how many items of each benchmark were left out, from the scores of the base."""
    benchmarks = summary["models"][BASE]["scores"]["benchmarks"]
    counts = {}
    for name, scores in benchmarks.items():
        if scores["left_out"]:
            counts[name] = scores["left_out"]
    return counts


def _left_out_reasons(summary: Summary) -> dict[str, Reasons]:
    """Return the reasons by benchmark or kind, from the records of all models."""
    reasons: dict[str, Reasons] = {}
    for path in summary["items"].values():
        for record in _read_records(Path(path)):
            if "left_out" not in record:
                continue
            kind = record["kind"]
            name = record.get("benchmark") or UNNAMED[kind]
            by_item = reasons.setdefault(name, {})
            by_item[kind, record["id"]] = record["left_out"]
    return reasons


def _join_reasons(reasons: list[str]) -> str:
    parts = reasons[:MAX_REASONS]
    more = len(reasons) - MAX_REASONS
    if more > 0:
        parts.append(f"and {more} more like it")
    return "; ".join(parts)


def samples(summary: Summary) -> list[dict[str, Record]]:
    """Return the first prompts that every model answered: for each, label → record."""
    answers: dict[str, dict[int, Record]] = {}
    paths = summary["items"]
    for label in summary["models"]:
        if label != QUANTIZED_BASE and label in paths:
            path = Path(paths[label])
            answers[label] = _generations(path)
    if not answers:
        return []
    shared = set.intersection(*map(set, answers.values()))
    rows = []
    for item in sorted(shared)[:MAX_SAMPLES]:
        row = {}
        for label, records in answers.items():
            row[label] = records[item]
        rows.append(row)
    return rows


def _generations(path: Path) -> dict[int, Record]:
    """Return the generations of one model by item id, without those that were left out."""
    generations = {}
    for record in _read_records(path):
        if record["kind"] == "generation" and "left_out" not in record:
            generations[record["id"]] = record
    return generations


def _read_records(path: Path) -> Iterator[Record]:
    # iterates over the file: str.splitlines would also split at separators inside an answer
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
