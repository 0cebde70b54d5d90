"""Differences are paired, positive if better, and zero if nothing changed."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.comparison.differences import (
    Change,
    change,
    drop_beyond_control,
    gain_share,
    general_change,
    task_gain,
)
from pipelines.comparison.record_types import ItemRecord
from pipelines.comparison.resampling import Interval

Records = list[ItemRecord]
Maker = Callable[..., Records]
STRETCH_OF_TWO = 12.70620 / 1.959964 * 2**0.5
"""How far the end of an interval of two items is stretched."""
BENCHMARKS = ("piqa", "winogrande", "lambada")
SINGLE_METRICS = (
    "task_gain",
    "choice_probability",
    "accuracy",
    "margin",
    "text_loss",
    "chat_loss",
)


def ends(interval: Interval | None) -> tuple[float, float, float]:
    assert interval is not None
    return interval.mean, interval.low, interval.high


def intervals(result: Change) -> list[Interval]:
    """Return every interval of a change; none may be missing."""
    names = {field.name for field in fields(result)}
    assert names == {*SINGLE_METRICS, "generation", "benchmarks"}
    every = [getattr(result, name) for name in SINGLE_METRICS]
    every += result.generation.values()
    every += [Interval(one.mean, one.low, one.high) for one in result.benchmarks.values()]
    assert len(every) == 6 + 1 + len(BENCHMARKS)
    assert all(isinstance(one, Interval) for one in every)
    return every


@pytest.fixture(scope="session")
def random_records(
    task_records: Maker, general_records: Maker, generation_records: Maker, loss_records: Maker
) -> Maker:
    """Return a factory of one model's records of every kind, random by seed."""

    def make(seed: int, items: int = 9) -> Records:
        rng = np.random.default_rng(seed)
        records = task_records(list(rng.uniform(1, 4, items)))
        for benchmark in BENCHMARKS:
            records += general_records(benchmark, list(rng.uniform(0.1, 0.9, items)))
        records += generation_records([{"chrf": value} for value in rng.uniform(0, 100, items)])
        records += loss_records("text", rng.uniform(9, 30, items))
        return records + loss_records("chat", rng.uniform(3, 9, items))

    return make


def test_better_is_positive_in_every_metric(
    task_records: Maker, general_records: Maker, generation_records: Maker, loss_records: Maker
) -> None:
    def model(loss: float, probability: float, chrf: float) -> Records:
        return (
            task_records([loss] * 2, [4, 6])
            + general_records("piqa", [probability] * 2)
            + generation_records([{"chrf": chrf}] * 2)
            + loss_records("text", [10 * loss] * 2)
            + loss_records("chat", [5 * loss] * 2)
        )

    bad = model(2.0, 0.4, 10.0)
    good = model(1.5, 0.7, 30.0)
    better = change(bad, good)
    worse = change(good, bad)
    expected = {
        "task_gain": 0.5,
        "choice_probability": 0.3,
        "accuracy": 1.0,
        "text_loss": 0.25,
        "chat_loss": 0.5,
    }
    for name, value in expected.items():
        assert ends(getattr(better, name)) == pytest.approx((value,) * 3)
        assert ends(getattr(worse, name)) == pytest.approx((-value,) * 3)
    assert better.margin is not None
    assert better.margin.low > 0
    assert ends(better.generation["chrf"]) == pytest.approx((20.0,) * 3)
    assert better.benchmarks["piqa"].mean == pytest.approx(0.3)


def test_the_task_gain_is_per_token(task_records: Maker) -> None:
    gain = task_gain(task_records([2.5, 1.0], [4, 6]), task_records([2.0, 1.0], [4, 6]))
    assert gain.mean == pytest.approx(2 / 10)
    assert gain.mean - gain.low == pytest.approx(0.2 * STRETCH_OF_TWO, rel=1e-4)
    assert gain.high - gain.mean == pytest.approx(0.3 * STRETCH_OF_TWO, rel=1e-4)


def test_no_change_gives_intervals_of_zero(random_records: Maker) -> None:
    records = random_records(1)
    same = change(records, records)
    assert {ends(interval) for interval in intervals(same)} == {(0.0, 0.0, 0.0)}
    assert {(one.p_value, one.adjusted_p) for one in same.benchmarks.values()} == {(1.0, 1.0)}
    beyond = drop_beyond_control(records, records, control_base=records, adapter_base=records)
    assert ends(beyond) == (0.0, 0.0, 0.0)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_swapping_before_and_after_negates_every_metric(
    random_records: Maker, first: int, second: int
) -> None:
    forward = change(random_records(first), random_records(second))
    backward = change(random_records(second), random_records(first))
    for one, other in zip(intervals(forward), intervals(backward), strict=True):
        assert ends(other) == pytest.approx((-one.mean, -one.high, -one.low), abs=2e-6)
    for name, one in forward.benchmarks.items():
        assert one.p_value == backward.benchmarks[name].p_value
        assert one.adjusted_p == backward.benchmarks[name].adjusted_p


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_the_order_of_items_changes_nothing(random_records: Maker, seed: int, random: Any) -> None:
    """Means and p-values are equal; the ends of intervals differ as between two resamplings."""
    before = random_records(seed)
    after = random_records(seed + 1)
    order = random.sample(range(len(before)), len(before))
    result = change(before, after)
    shuffled = change([before[index] for index in order], [after[index] for index in order])
    assert shuffled.benchmarks.keys() == result.benchmarks.keys()
    for name, one in result.benchmarks.items():
        assert shuffled.benchmarks[name].mean == pytest.approx(one.mean, abs=2e-6)
        assert shuffled.benchmarks[name].p_value == pytest.approx(one.p_value, abs=2e-6)
    for name in SINGLE_METRICS:
        one = getattr(result, name)
        other = getattr(shuffled, name)
        assert other.mean == pytest.approx(one.mean, abs=2e-6)
        step = 1 / 27 if name == "accuracy" else 0  # one of 27 answers
        tolerance = 0.15 * (one.high - one.low) + step + 2e-6
        assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=tolerance)


def test_an_interval_is_deterministic(random_records: Maker) -> None:
    first = random_records(3)
    second = random_records(4)
    result = change(first, second)
    assert change(first, second) == result
    assert result.task_gain.low < result.task_gain.mean < result.task_gain.high


def test_unpaired_items_are_rejected(random_records: Maker) -> None:
    message = "scored on different items; score both with the same seed and settings"
    with pytest.raises(ValueError, match=message):
        change(random_records(1), random_records(2)[::-1])


def test_a_metric_needs_two_answers_that_both_models_have(
    task_records: Maker, generation_records: Maker
) -> None:
    task = task_records([1.0, 2.0])
    before = generation_records([{"chrf": 1.0, "bleu": 1.0}] * 3)
    after = generation_records([{"chrf": 3.0}] * 3)
    after[0] = replace(after[0], metrics={"bleu": 9.0}, errors={"chrf": "no reference"})
    generation = change(task + before, task + after).generation
    assert list(generation) == ["chrf"]
    assert ends(generation["chrf"]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("kind", ["generation", "text", "chat"])
def test_a_model_that_lacks_a_kind_has_no_change_of_it(random_records: Maker, kind: str) -> None:
    """A model that only the frontier shows has fewer kinds; those that both have are compared."""
    complete = random_records(1)
    partial = [record for record in random_records(2) if record.kind != kind]
    for result in (change(complete, partial), change(partial, complete)):
        changes = {
            "generation": result.generation or None,
            "text": result.text_loss,
            "chat": result.chat_loss,
        }
        assert [name for name, value in changes.items() if value is None] == [kind]


def test_what_was_not_evaluated_has_no_change(task_records: Maker) -> None:
    result = change(task_records([1.0, 2.0]), task_records([1.0, 1.0]))
    for name in SINGLE_METRICS[1:]:
        assert getattr(result, name) is None
    assert result.generation == {}
    assert result.benchmarks == {}
    assert general_change(task_records([1.0]), task_records([1.0])) is None


def test_the_gain_share_is_a_fraction_of_the_control_gain(task_records: Maker) -> None:
    base, control, adapter = (task_records([loss] * 4) for loss in (4.0, 2.0, 3.0))
    assert ends(gain_share(base, control, adapter)) == pytest.approx((0.5,) * 3)
    assert ends(gain_share(base, control, control)) == pytest.approx((1.0,) * 3)
    assert ends(gain_share(base, control, base)) == pytest.approx((0.0,) * 3)


@pytest.mark.parametrize(
    "losses",
    [[4.0] * 4, [4.5] * 4, [4.5, 3.0, 4.4, 3.9]],
    ids=["nothing", "a loss", "not significant"],
)
def test_there_is_no_gain_share_without_a_significant_control_gain(
    task_records: Maker, losses: list[float]
) -> None:
    base = task_records([4.0] * 4)
    assert gain_share(base, task_records(losses), task_records([3.0] * 4)) is None


def test_each_model_is_compared_with_its_own_base(general_records: Maker) -> None:
    probabilities = (0.6, 0.58, 0.5, 0.45)
    dense, control, quantized, adapter = (general_records("piqa", [p] * 4) for p in probabilities)
    beyond = drop_beyond_control(control, adapter, control_base=dense, adapter_base=quantized)
    assert ends(beyond) == pytest.approx((-0.05 + 0.02,) * 3)
