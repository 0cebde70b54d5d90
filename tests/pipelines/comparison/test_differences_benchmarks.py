"""Benchmarks have equal weight, and open questions are compared benchmark by benchmark."""

from collections.abc import Callable

import pytest

from pipelines.comparison.differences import (
    change,
    displayed_change,
    general_change,
    general_metric,
    general_samples,
    open_samples,
    score_scales,
)
from pipelines.comparison.record_types import ItemRecord
from pipelines.comparison.resampling import Interval

Records = list[ItemRecord]
Maker = Callable[..., Records]
Leave = Callable[[Records, str], Records]


def ends(interval: Interval | None) -> tuple[float, float, float]:
    assert interval is not None
    return interval.mean, interval.low, interval.high


def test_benchmarks_have_equal_weight_and_items_are_resampled_within_them(
    task_records: Maker, general_records: Maker
) -> None:
    """Constant differences within each benchmark have no variance, whatever the benchmarks."""
    task = task_records([1.0, 1.0])
    before = task + general_records("piqa", [0.4] * 5) + general_records("lambada", [0.4] * 2)
    after = task + general_records("piqa", [0.5] * 5) + general_records("lambada", [0.7] * 2)
    assert ends(change(before, after).choice_probability) == pytest.approx((0.2,) * 3)


def test_a_benchmark_with_a_single_item_left_is_not_counted(
    task_records: Maker, general_records: Maker, without: Leave
) -> None:
    def model(probability: float) -> Records:
        records = (
            task_records([1.0, 1.0])
            + general_records("piqa", [probability] * 3)
            + general_records("lambada", [0.5, probability])
        )
        return without(records, "lambada/0")

    result = change(model(0.4), model(0.6))
    assert list(result.benchmarks) == ["piqa"]
    assert ends(result.choice_probability) == pytest.approx((0.2,) * 3)


def test_open_questions_change_accuracy_but_not_the_general_change(
    task_records: Maker, general_records: Maker, probe_records: Maker, score_records: Maker
) -> None:
    def model(probability: float, right: list[bool], perplexity: float) -> Records:
        return (
            task_records([1.0, 1.0])
            + general_records("piqa", [probability] * 3)
            + probe_records("capitals", right)
            + score_records("perplexity", [perplexity] * 2, higher_is_better=False)
        )

    before = model(0.6, [True, True], 10.0)
    after = model(0.7, [False, False], 12.0)
    result = change(before, after)
    means = {name: one.mean for name, one in result.benchmarks.items()}
    assert means == pytest.approx({"piqa": 0.1, "capitals": -1.0, "perplexity": -2.0})
    assert ends(result.choice_probability) == pytest.approx((0.1,) * 3)
    assert ends(result.accuracy) == pytest.approx((-0.5,) * 3)
    assert list(general_samples(before, after)) == ["piqa"]
    assert general_metric(before) == "choice_probability"


def test_open_questions_are_compared_by_benchmark(
    task_records: Maker, general_records: Maker, probe_records: Maker, score_records: Maker
) -> None:
    def model(right: list[bool], perplexity: list[float]) -> Records:
        return (
            task_records([1.0])
            + general_records("piqa", [0.6] * 3)
            + probe_records("capitals", right)
            + score_records("perplexity", perplexity, higher_is_better=False)
            + score_records("f1", [0.5])
        )

    before = model([True, True, False], [10.0, 30.0])
    after = model([True, False, False], [11.0, 33.0])
    samples = {name: list(values) for name, values in open_samples(before, after).items()}
    assert samples == {"capitals": [0.0, -1.0, 0.0], "perplexity": [-1.0, -3.0]}
    assert score_scales(before) == {"perplexity": 20.0, "f1": 0.5}


def test_scores_of_any_scale_are_displayed_but_not_a_general_change(
    task_records: Maker, score_records: Maker, general_records: Maker
) -> None:
    before = task_records([1.0]) + score_records("perplexity", [10.0] * 3)
    after = task_records([1.0]) + score_records("perplexity", [7.0] * 3)
    assert general_samples(before, after) == {}
    assert general_change(before, after) is None
    assert ends(displayed_change(before, after)) == (-3.0,) * 3
    before += general_records("piqa", [0.6] * 3)
    after += general_records("piqa", [0.5] * 3)
    assert ends(displayed_change(before, after)) == pytest.approx((-0.1,) * 3)


def test_without_choices_accuracy_is_the_general_metric(
    task_records: Maker, probe_records: Maker, score_records: Maker
) -> None:
    before = (
        task_records([1.0]) + probe_records("capitals", [True] * 4) + score_records("f1", [0.9] * 3)
    )
    after = (
        task_records([1.0])
        + probe_records("capitals", [True, False] * 2)
        + score_records("f1", [0.1] * 3)
    )
    assert general_metric(before) == "accuracy"
    result = general_change(before, after)
    assert result is not None
    assert result.mean == pytest.approx(-0.5)


def test_p_values_are_adjusted_for_multiple_benchmarks(
    task_records: Maker, general_records: Maker
) -> None:
    """By hand: three all-positive benchmarks of 8, 6 and 4 items have p = 2/2⁸, 2/2⁶ and 2/2⁴.

    A fourth without an effect has p = 1. Benjamini and Hochberg multiply the k-th smallest of four
    by 4/k, and let none exceed a larger one's.
    """
    before = task_records([1.0])
    after = task_records([1.0])
    for benchmark, items in {"piqa": 8, "arc_easy": 6, "lambada": 4}.items():
        better = [0.6 + 0.01 * number for number in range(items)]
        before += general_records(benchmark, [0.4] * items)
        after += general_records(benchmark, better)
    before += general_records("openbookqa", [0.5, 0.5])
    after += general_records("openbookqa", [0.6, 0.4])
    results = change(before, after).benchmarks.values()
    p_values = [2 / 256, 2 / 64, 2 / 16, 1.0]
    adjusted = [4 * 2 / 256, 2 * 2 / 64, 4 / 3 * 2 / 16, 1.0]
    assert [one.p_value for one in results] == pytest.approx(p_values, abs=1e-6)
    assert [one.adjusted_p for one in results] == pytest.approx(adjusted, abs=1e-6)
