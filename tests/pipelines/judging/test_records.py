"""Models are compared on the same items only, and what one could not read is left out for all and counted."""

from collections.abc import Callable
from typing import Any

import pytest

from pipelines.judging.records import align, by_benchmark, check_paired, left_out, scored

Values = dict[str, Any]
Records = list[Values]
Maker = Callable[..., Records]
Leave = Callable[[Records, str], Records]


@pytest.fixture
def records(task_records: Maker, general_records: Maker) -> Records:
    return task_records([1.0, 2.0]) + general_records("piqa", [0.5, 0.6]) + general_records("arc_easy", [0.7, 0.8])


def test_what_one_model_left_out_is_left_out_for_all(records: Records, without: Leave) -> None:
    aligned = align({"base": records, "rank-2": without(records, "piqa/1"), "rank-4": without(records, "arc_easy/0")})
    for label in ("base", "rank-2", "rank-4"):
        assert [one["id"] for one in scored(aligned[label], "general")] == ["piqa/0", "arc_easy/1"]
        assert left_out(aligned[label]) == {"piqa": 1, "arc_easy": 1}
    assert len(scored(aligned["base"], "task")) == 2
    assert "left_out" not in records[3]


def test_where_nothing_was_left_out_nothing_changes(records: Records) -> None:
    assert align({"base": records, "rank-2": records}) == {"base": records, "rank-2": records}
    assert left_out(records) == {}


def test_a_benchmark_is_a_group_in_the_order_of_its_items(records: Records) -> None:
    assert {name: [one["id"] for one in rows] for name, rows in by_benchmark(records, "general").items()} == {
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
def test_items_that_do_not_pair_are_refused(records: Records, spoil: Callable[[Records], Records]) -> None:
    with pytest.raises(ValueError, match="scored on different items; score both with the same seed and settings"):
        check_paired(records, spoil(records))
    with pytest.raises(ValueError, match="scored on different items"):
        align({"base": records, "rank-2": spoil(records)})
