"""Models are compared on the same items only, and what one could not read is left out for all and counted."""

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


def test_what_one_model_left_out_is_left_out_for_all(records: Records, without: Leave) -> None:
    aligned = align(
        {
            "base": records,
            "rank-2": without(records, "piqa/1"),
            "rank-4": without(records, "arc_easy/0"),
        }
    )
    for label in ("base", "rank-2", "rank-4"):
        assert [one["id"] for one in scored(aligned[label], "general")] == ["piqa/0", "arc_easy/1"]
        assert left_out(aligned[label]) == {"piqa": 1, "arc_easy": 1}
    assert len(scored(aligned["base"], "task")) == 2
    assert "left_out" not in records[3]


def test_where_nothing_was_left_out_nothing_changes(records: Records) -> None:
    assert align({"base": records, "rank-2": records}) == {"base": records, "rank-2": records}
    assert left_out(records) == {}


def test_what_was_left_out_is_counted_whatever_its_kind() -> None:
    reason = {"left_out": "600 tokens exceed the context of 512"}
    named = [
        {"kind": kind, "id": 0, "benchmark": name, **reason}
        for kind, name in (("score", "mine"), ("generation", "answers"))
    ]
    unnamed = [
        {"kind": kind, "id": 1, **reason} for kind in ("generation", "text", "chat", "chat", "task")
    ]
    assert left_out([*named, *unnamed]) == {
        "mine": 1,
        "answers": 2,
        "passages": 1,
        "chat": 2,
        "examples": 1,
    }


def test_answers_that_did_not_come_to_an_end_are_counted_by_benchmark(records: Records) -> None:
    answers = [
        {"kind": "generation", "id": 0, "benchmark": "answers", "ended": False},
        {"kind": "generation", "id": 1, "benchmark": "answers", "ended": True},
        {"kind": "score", "id": "mine/0", "benchmark": "mine", "ended": False},
        {
            "kind": "score",
            "id": "mine/1",
            "benchmark": "mine",
            "ended": False,
            "left_out": "too long for another of the models",
        },
    ]
    assert unfinished([*records, *answers]) == {"answers": 1, "mine": 1}


def test_an_answer_that_one_model_could_not_give_is_left_out_for_all(records: Records) -> None:
    head = {"kind": "generation", "id": 0, "benchmark": "answers", "prompt_sha256": "digest"}
    answered, unasked = (
        {**head, "ended": True, "metrics": {"chrf": 50.0}, "errors": {}},
        {**head, "left_out": "too long"},
    )
    aligned = align({"base": [*records, answered], "rank-2": [*records, unasked]})
    assert [left_out(aligned[label]) for label in ("base", "rank-2")] == [{"answers": 1}] * 2
    assert scored(aligned["base"], "generation") == []


def test_held_out_examples_are_the_same_only_where_their_digests_are(records: Records) -> None:
    one, other = (
        [{**record, "prompt_sha256": f"{seed} {record['id']}"} for record in records]
        for seed in (7, 8)
    )
    check_paired(one, one)
    with pytest.raises(ValueError, match="scored on different items"):
        check_paired(one[:2] + records[2:], other[:2] + records[2:])


def test_a_benchmark_is_a_group_in_the_order_of_its_items(records: Records) -> None:
    assert {
        name: [one["id"] for one in rows] for name, rows in by_benchmark(records, "general").items()
    } == {
        "piqa": ["piqa/0", "piqa/1"],
        "arc_easy": ["arc_easy/0", "arc_easy/1"],
    }


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r[:-1],
        lambda r: r[::-1],
        lambda r: [*r[:-1], {**r[-1], "id": "piqa/9"}],
        lambda r: [{**r[0], "kind": "generation"}, *r[1:]],
        lambda r: [*r[:-1], {**r[-1], "prompt_sha256": "digest of another prompt"}],
    ],
    ids=["one fewer", "another order", "another item", "another kind", "another prompt"],
)
def test_items_that_do_not_pair_are_refused(
    records: Records, spoil: Callable[[Records], Records]
) -> None:
    with pytest.raises(
        ValueError, match="scored on different items; score both with the same seed and settings"
    ):
        check_paired(records, spoil(records))
    with pytest.raises(ValueError, match="scored on different items"):
        align({"base": records, "rank-2": spoil(records)})
