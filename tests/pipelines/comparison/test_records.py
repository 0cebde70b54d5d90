"""Models are compared on the same items only; an item that one lacks is left out for all."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from pipelines.comparison.record_types import (
    ChoiceRecord,
    GenerationRecord,
    ItemRecord,
    LeftOutRecord,
    TaskRecord,
)
from pipelines.comparison.records import (
    align,
    by_benchmark,
    check_paired,
    left_out,
    of_type,
    unfinished,
)

Records = list[ItemRecord]
Maker = Callable[..., Records]
Leave = Callable[[Records, int | str], Records]


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
        kept = [record.id for record in of_type(aligned[label], ChoiceRecord)]
        assert kept == ["piqa/0", "arc_easy/1"]
        assert left_out(aligned[label]) == {"piqa": 1, "arc_easy": 1}
    assert len(of_type(aligned["base"], TaskRecord)) == 2
    assert isinstance(records[3], ChoiceRecord)


def test_align_changes_nothing_if_nothing_was_left_out(records: Records) -> None:
    items = {"base": records, "rank-2": records}
    assert align(items) == items
    assert left_out(records) == {}


def test_left_out_items_of_every_kind_are_counted() -> None:
    kinds = {
        "score": "mine",
        "general": "mine",
        "answer": "capitals",
        "generation": "answers",
        "text": "passages",
        "chat": "chat",
    }
    records = []
    for kind, benchmark in kinds.items():
        for number in range(2):
            record = LeftOutRecord(
                kind=kind,
                id=number,
                benchmark=benchmark,
                prompt_sha256=f"digest of {number}",
                left_out="600 tokens exceed the context of 512",
            )
            records.append(record)
    assert left_out(records) == {
        "mine": 4,
        "capitals": 2,
        "answers": 2,
        "passages": 2,
        "chat": 2,
    }


def test_unfinished_answers_are_counted_by_benchmark(
    records: Records, generation_records: Maker, score_records: Maker, without: Leave
) -> None:
    stopped, complete = generation_records([{}, {}], ended=False)
    scores = score_records("mine", [1.0, 2.0, 3.0, 4.0])
    ended = (False, False, True, None)
    scores = [replace(score, ended=one) for score, one in zip(scores, ended, strict=True)]
    answers = [stopped, replace(complete, ended=True), *without(scores, "mine/1")]
    assert unfinished([*records, *answers]) == {"answers": 1, "mine": 1}


def test_an_answer_that_one_model_could_not_give_is_left_out_for_all(
    records: Records, generation_records: Maker, without: Leave
) -> None:
    answered = records + generation_records([{"chrf": 50.0}])
    unanswered = records + without(generation_records([{}]), 0)
    aligned = align({"base": answered, "rank-2": unanswered})
    assert left_out(aligned["base"]) == {"answers": 1}
    assert left_out(aligned["rank-2"]) == {"answers": 1}
    assert of_type(aligned["base"], GenerationRecord) == []


def test_held_out_examples_are_the_same_only_if_their_digests_are_equal(records: Records) -> None:
    first = [replace(record, prompt_sha256=f"7 {record.id}") for record in records]
    second = [replace(record, prompt_sha256=f"8 {record.id}") for record in records]
    check_paired(first, first)
    with pytest.raises(ValueError, match="scored on different items"):
        check_paired(first[:2] + records[2:], second[:2] + records[2:])


def test_records_are_grouped_by_benchmark_in_order(records: Records) -> None:
    groups = by_benchmark(records, ChoiceRecord)
    assert {name: [record.id for record in rows] for name, rows in groups.items()} == {
        "piqa": ["piqa/0", "piqa/1"],
        "arc_easy": ["arc_easy/0", "arc_easy/1"],
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r[:-1],
        lambda r: r[::-1],
        lambda r: [*r[:-1], replace(r[-1], id="piqa/9")],
        lambda r: [replace(r[0], kind="generation"), *r[1:]],
        lambda r: [*r[:-1], replace(r[-1], prompt_sha256="digest of another prompt")],
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
