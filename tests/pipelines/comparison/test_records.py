"""Models are compared on the same items only; an item that one lacks is left out for all."""

from collections.abc import Callable
from typing import Any

import pytest

from pipelines.comparison.records import (
    align,
    by_benchmark,
    check_paired,
    left_out,
    scored,
    unfinished,
)

Values = dict[str, Any]
Records = list[Values]
Maker = Callable[..., Records]
Leave = Callable[[Records, str], Records]


@pytest.fixture
def records(task_records: Maker, general_records: Maker) -> Records:
    return (
        task_records([1.0, 2.0])
        + general_records("piqa", [0.5, 0.6])
        + general_records("arc_easy", [0.7, 0.8])
    )


def test_an_item_that_one_model_left_out_is_left_out_for_all(
    records: Records, without: Leave
) -> None:
    items = {
        "base": records,
        "rank-2": without(records, "piqa/1"),
        "rank-4": without(records, "arc_easy/0"),
    }
    aligned = align(items)
    for label in items:
        kept = [record["id"] for record in scored(aligned[label], "general")]
        assert kept == ["piqa/0", "arc_easy/1"]
        assert left_out(aligned[label]) == {"piqa": 1, "arc_easy": 1}
    assert len(scored(aligned["base"], "task")) == 2
    assert "left_out" not in records[3]


def test_align_changes_nothing_if_nothing_was_left_out(records: Records) -> None:
    items = {"base": records, "rank-2": records}
    assert align(items) == items
    assert left_out(records) == {}


def test_left_out_items_of_every_kind_are_counted() -> None:
    reason = {"left_out": "600 tokens exceed the context of 512"}
    named = [
        {"kind": "score", "id": 0, "benchmark": "mine", **reason},
        {"kind": "generation", "id": 0, "benchmark": "answers", **reason},
    ]
    kinds = ("generation", "text", "chat", "chat", "task")
    unnamed = [{"kind": kind, "id": 1, **reason} for kind in kinds]
    assert left_out([*named, *unnamed]) == {
        "mine": 1,
        "answers": 2,
        "passages": 1,
        "chat": 2,
        "examples": 1,
    }


def test_unfinished_answers_are_counted_by_benchmark(records: Records) -> None:
    answer = {"kind": "generation", "benchmark": "answers"}
    score = {"kind": "score", "benchmark": "mine"}
    answers = [
        {**answer, "id": 0, "ended": False},
        {**answer, "id": 1, "ended": True},
        {**score, "id": "mine/0", "ended": False},
        {**score, "id": "mine/1", "ended": False, "left_out": "too long for another model"},
    ]
    assert unfinished([*records, *answers]) == {"answers": 1, "mine": 1}


def test_an_answer_that_one_model_could_not_give_is_left_out_for_all(records: Records) -> None:
    prompt = {"kind": "generation", "id": 0, "benchmark": "answers", "prompt_sha256": "digest"}
    answered = {**prompt, "ended": True, "metrics": {"chrf": 50.0}, "errors": {}}
    unanswered = {**prompt, "left_out": "too long"}
    aligned = align({"base": [*records, answered], "rank-2": [*records, unanswered]})
    assert left_out(aligned["base"]) == {"answers": 1}
    assert left_out(aligned["rank-2"]) == {"answers": 1}
    assert scored(aligned["base"], "generation") == []


def test_held_out_examples_are_the_same_only_if_their_digests_are_equal(records: Records) -> None:
    first = [{**record, "prompt_sha256": f"7 {record['id']}"} for record in records]
    second = [{**record, "prompt_sha256": f"8 {record['id']}"} for record in records]
    check_paired(first, first)
    with pytest.raises(ValueError, match="scored on different items"):
        check_paired(first[:2] + records[2:], second[:2] + records[2:])


def test_records_are_grouped_by_benchmark_in_order(records: Records) -> None:
    groups = by_benchmark(records, "general")
    assert {name: [record["id"] for record in rows] for name, rows in groups.items()} == {
        "piqa": ["piqa/0", "piqa/1"],
        "arc_easy": ["arc_easy/0", "arc_easy/1"],
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r[:-1],
        lambda r: r[::-1],
        lambda r: [*r[:-1], {**r[-1], "id": "piqa/9"}],
        lambda r: [{**r[0], "kind": "generation"}, *r[1:]],
        lambda r: [*r[:-1], {**r[-1], "prompt_sha256": "digest of another prompt"}],
    ],
    ids=["one fewer", "another order", "another item", "another kind", "another prompt"],
)
def test_unpaired_items_are_rejected(
    records: Records, change: Callable[[Records], Records]
) -> None:
    message = "scored on different items; score both with the same seed and settings"
    with pytest.raises(ValueError, match=message):
        check_paired(records, change(records))
    with pytest.raises(ValueError, match="scored on different items"):
        align({"base": records, "rank-2": change(records)})
