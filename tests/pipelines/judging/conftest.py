"""Makers of the records that only judging reads; those of examples and questions stand with the pipeline's tests."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

Values = dict[str, Any]
Maker = Callable[..., list[Values]]


@pytest.fixture(scope="session")
def generation_records() -> Maker:
    """Return a maker of generated answers, from the metrics of each."""

    def make(metrics: Sequence[dict[str, float]], *, ended: bool = True) -> list[Values]:
        return [
            {
                "kind": "generation",
                "id": number,
                "prompt": f"question {number}",
                "prompt_sha256": f"digest of {number}",
                "answer": "the cat sat on the mat",
                "reference": "the cat sat on the mat",
                "ended": ended,
                "metrics": dict(values),
                "errors": {},
            }
            for number, values in enumerate(metrics)
        ]

    return make


@pytest.fixture(scope="session")
def probe_records() -> Maker:
    """Return a maker of questions with one answer, from whether each was the likeliest."""

    def make(benchmark: str, greedy: Sequence[bool]) -> list[Values]:
        one = {"kind": "answer", "benchmark": benchmark, "nll": 3.0, "tokens": 2, "bytes": 7}
        return [
            {
                **one,
                "id": f"{benchmark}/{number}",
                "prompt_sha256": f"digest of {number}",
                "greedy": right,
            }
            for number, right in enumerate(greedy)
        ]

    return make


@pytest.fixture(scope="session")
def score_records() -> Maker:
    """Return a maker of documents that a task rates itself, from the value of each."""

    def make(
        benchmark: str, values: Sequence[float], *, higher_is_better: bool = True
    ) -> list[Values]:
        one = {
            "kind": "score",
            "benchmark": benchmark,
            "metric": "f1",
            "higher_is_better": higher_is_better,
        }
        return [
            {**one, "id": f"{benchmark}/{number}", "value": float(value)}
            for number, value in enumerate(values)
        ]

    return make


@pytest.fixture(scope="session")
def loss_records() -> Maker:
    """Return a maker of passages or chats, from the summed loss of each; a chat has two positions."""

    def make(kind: str, losses: Sequence[float]) -> list[Values]:
        benchmark = {"text": "passages", "chat": "chat"}[kind]
        one = {"kind": kind, "benchmark": benchmark, "tokens": 5, "bytes": 20}
        return [
            {
                **one,
                "id": f"{benchmark}/{number}",
                "nll": float(loss),
                "rows": [2 * number, 2 * number + 2],
            }
            for number, loss in enumerate(losses)
        ]

    return make


@pytest.fixture(scope="session")
def without() -> Callable[[list[Values], str], list[Values]]:
    """Return a function that leaves one item out."""

    def leave(records: list[Values], name: str) -> list[Values]:
        kept = ("kind", "id", "benchmark", "prompt_sha256")
        reason = {"left_out": "1,234 tokens exceed the context of 1,024"}
        return [
            {key: one[key] for key in kept if key in one} | reason if one["id"] == name else one
            for one in records
        ]

    return leave
