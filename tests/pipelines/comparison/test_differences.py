"""Differences are paired, positive where it is better, and nothing where nothing changed; each effect has its own base."""

from collections.abc import Callable
from dataclasses import fields
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
    general_figure,
    general_samples,
    open_samples,
    pictured_change,
    score_scales,
    task_gain,
)
from pipelines.comparison.resampling import Interval

Values = dict[str, Any]
Records = list[Values]
Maker = Callable[..., Records]
Leave = Callable[[Records, str], Records]
Scored = Callable[..., Records]
FEW = 12.70620 / 1.959964 * 2**0.5
"""Of two items, how far an end of an interval is stretched."""
BENCHMARKS = ("piqa", "winogrande", "lambada")


def ends(interval: Interval | None) -> tuple[float, float, float]:
    assert interval is not None
    return interval.mean, interval.low, interval.high


def intervals(found: Change) -> list[Interval]:
    """Return every interval of a change, all of which must be there."""
    single = [
        getattr(found, one.name)
        for one in fields(found)
        if one.name not in ("generation", "benchmarks")
    ]
    every = [
        *single,
        *found.generation.values(),
        *(Interval(b.mean, b.low, b.high) for b in found.benchmarks.values()),
    ]
    assert len(every) == 6 + 1 + len(BENCHMARKS)
    assert all(isinstance(one, Interval) for one in every)
    return every


@pytest.fixture(scope="session")
def anything(
    task_records: Maker, general_records: Maker, generation_records: Maker, loss_records: Maker
) -> Scored:
    """Return a maker of one model's records of every kind, drawn by seed."""

    def make(seed: int, items: int = 9) -> Records:
        rng = np.random.default_rng(seed)
        records = task_records(list(rng.uniform(1, 4, items)))
        for benchmark in BENCHMARKS:
            records += general_records(benchmark, list(rng.uniform(0.1, 0.9, items)))
        records += generation_records([{"chrf": value} for value in rng.uniform(0, 100, items)])
        return (
            records
            + loss_records("text", rng.uniform(9, 30, items))
            + loss_records("chat", rng.uniform(3, 9, items))
        )

    return make


def test_better_is_positive_in_every_figure(
    task_records: Maker, general_records: Maker, generation_records: Maker, loss_records: Maker
) -> None:
    def model(loss: float, probability: float, chrf: float) -> Records:
        records = (
            task_records([loss] * 2, [4, 6])
            + general_records("piqa", [probability] * 2)
            + generation_records([{"chrf": chrf}] * 2)
        )
        return (
            records + loss_records("text", [10 * loss] * 2) + loss_records("chat", [5 * loss] * 2)
        )

    better, worse = (
        change(*pair)
        for pair in (
            (model(2.0, 0.4, 10.0), model(1.5, 0.7, 30.0)),
            (model(1.5, 0.7, 30.0), model(2.0, 0.4, 10.0)),
        )
    )
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
    assert (gain.mean - gain.low, gain.high - gain.mean) == pytest.approx(
        (0.2 * FEW, 0.3 * FEW), rel=1e-4
    )


def test_a_change_weighs_benchmarks_the_same_and_draws_items_within_them(
    task_records: Maker, general_records: Maker
) -> None:
    """Constant differences inside each benchmark leave nothing to chance, however the benchmarks differ."""
    rest = task_records([1.0, 1.0])
    before = rest + general_records("piqa", [0.4] * 5) + general_records("lambada", [0.4] * 2)
    after = rest + general_records("piqa", [0.5] * 5) + general_records("lambada", [0.7] * 2)
    assert ends(change(before, after).choice_probability) == pytest.approx((0.2,) * 3)


def test_no_change_gives_an_interval_of_nothing(anything: Scored) -> None:
    records = anything(1)
    same = change(records, records)
    assert {ends(interval) for interval in intervals(same)} == {(0.0, 0.0, 0.0)}
    assert {(one.p_value, one.adjusted_p) for one in same.benchmarks.values()} == {(1.0, 1.0)}
    assert ends(drop_beyond_control((records, records), records, records)) == (0.0, 0.0, 0.0)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_swapping_before_and_after_turns_every_figure_round(
    anything: Scored, first: int, second: int
) -> None:
    forward, backward = (
        change(anything(first), anything(second)),
        change(anything(second), anything(first)),
    )
    for one, other in zip(intervals(forward), intervals(backward), strict=True):
        assert ends(other) == pytest.approx((-one.mean, -one.high, -one.low), abs=2e-6)
    for one, other in zip(forward.benchmarks.values(), backward.benchmarks.values(), strict=True):
        assert (one.p_value, one.adjusted_p) == (other.p_value, other.adjusted_p)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_the_order_of_items_changes_nothing(anything: Scored, seed: int, random: Any) -> None:
    """Means and p-values stay; an end of an interval moves by no more than another draw would move it."""
    before, after = anything(seed), anything(seed + 1)
    order = random.sample(range(len(before)), len(before))
    found, shuffled = (
        change(before, after),
        change([before[i] for i in order], [after[i] for i in order]),
    )
    assert shuffled.benchmarks.keys() == found.benchmarks.keys()
    for name, one in found.benchmarks.items():
        assert (shuffled.benchmarks[name].mean, shuffled.benchmarks[name].p_value) == pytest.approx(
            (one.mean, one.p_value), abs=2e-6
        )
    for name in ("task_gain", "choice_probability", "accuracy", "margin", "text_loss", "chat_loss"):
        one, other = getattr(found, name), getattr(shuffled, name)
        assert other.mean == pytest.approx(one.mean, abs=2e-6)
        step = 1 / 27 if name == "accuracy" else 0  # what one of 27 answers moves it by
        assert (other.low, other.high) == pytest.approx(
            (one.low, one.high), abs=0.15 * (one.high - one.low) + step + 2e-6
        )


def test_an_interval_is_the_same_each_time(anything: Scored) -> None:
    first, second = anything(3), anything(4)
    assert change(first, second) == change(first, second)
    assert (
        change(first, second).task_gain.low
        < change(first, second).task_gain.mean
        < change(first, second).task_gain.high
    )


def test_items_that_do_not_pair_are_refused(anything: Scored) -> None:
    with pytest.raises(
        ValueError, match="scored on different items; score both with the same seed and settings"
    ):
        change(anything(1), anything(2)[::-1])


def test_one_answer_is_too_few_for_an_interval_and_what_failed_in_one_model_is_not_compared(
    task_records: Maker, generation_records: Maker
) -> None:
    task = task_records([1.0, 2.0])
    before, after = (
        generation_records([{"chrf": 1.0, "bleu": 1.0}] * 3),
        generation_records([{"chrf": 3.0}] * 3),
    )
    after[0]["metrics"], after[0]["errors"] = {"bleu": 9.0}, {"chrf": "no reference"}
    assert {
        name: ends(one) for name, one in change(task + before, task + after).generation.items()
    } == {"chrf": (2.0, 2.0, 2.0)}


@pytest.mark.parametrize("kind", ["generation", "text", "chat"])
def test_a_model_that_lacks_a_kind_has_no_change_of_it(anything: Scored, kind: str) -> None:
    """A model that only the picture shows is asked less; what both answered is compared."""
    whole, less = anything(1), [record for record in anything(2) if record["kind"] != kind]
    for found in (change(whole, less), change(less, whole)):
        lacking = {
            "generation": found.generation or None,
            "text": found.text_loss,
            "chat": found.chat_loss,
        }
        assert [name for name, value in lacking.items() if value is None] == [kind]


def test_what_was_not_asked_has_no_change(task_records: Maker) -> None:
    found = change(task_records([1.0, 2.0]), task_records([1.0, 1.0]))
    assert (
        found.choice_probability,
        found.accuracy,
        found.margin,
        found.text_loss,
        found.chat_loss,
    ) == (None,) * 5
    assert (found.generation, found.benchmarks) == ({}, {})
    assert general_change(task_records([1.0]), task_records([1.0])) is None


def test_a_benchmark_of_which_one_item_is_left_is_not_counted(
    task_records: Maker, general_records: Maker, without: Leave
) -> None:
    def model(probability: float) -> Records:
        records = (
            task_records([1.0, 1.0])
            + general_records("piqa", [probability] * 3)
            + general_records("lambada", [0.5, probability])
        )
        return without(records, "lambada/0")

    found = change(model(0.4), model(0.6))
    assert list(found.benchmarks) == ["piqa"]
    assert ends(found.choice_probability) == pytest.approx((0.2,) * 3)


def test_questions_without_choices_have_a_change_of_accuracy_and_no_part_in_the_general_one(
    task_records: Maker, general_records: Maker, probe_records: Maker, score_records: Maker
) -> None:
    def model(probability: float, right: list[bool], perplexity: float) -> Records:
        records = (
            task_records([1.0, 1.0])
            + general_records("piqa", [probability] * 3)
            + probe_records("capitals", right)
        )
        return records + score_records("perplexity", [perplexity] * 2, higher_is_better=False)

    before, after = model(0.6, [True, True], 10.0), model(0.7, [False, False], 12.0)
    found = change(before, after)
    assert {name: one.mean for name, one in found.benchmarks.items()} == pytest.approx(
        {"piqa": 0.1, "capitals": -1.0, "perplexity": -2.0}
    )
    assert ends(found.choice_probability) == pytest.approx((0.1,) * 3)
    assert ends(found.accuracy) == pytest.approx((-0.5,) * 3)
    assert list(general_samples(before, after)) == ["piqa"]
    assert general_figure(before) == "choice_probability"


def test_open_questions_are_compared_by_benchmark(
    task_records: Maker, general_records: Maker, probe_records: Maker, score_records: Maker
) -> None:
    def model(right: list[bool], perplexity: list[float]) -> Records:
        records = (
            task_records([1.0])
            + general_records("piqa", [0.6] * 3)
            + probe_records("capitals", right)
        )
        return (
            records
            + score_records("perplexity", perplexity, higher_is_better=False)
            + score_records("f1", [0.5])
        )

    before, after = (
        model([True, True, False], [10.0, 30.0]),
        model([True, False, False], [11.0, 33.0]),
    )
    found = {name: list(values) for name, values in open_samples(before, after).items()}
    assert found == {"capitals": [0.0, -1.0, 0.0], "perplexity": [-1.0, -3.0]}
    assert score_scales(before) == {"perplexity": 20.0, "f1": 0.5}


def test_scores_of_their_own_scale_are_drawn_and_stand_for_nothing(
    task_records: Maker, score_records: Maker, general_records: Maker
) -> None:
    before, after = (
        task_records([1.0]) + score_records("perplexity", [value] * 3) for value in (10.0, 7.0)
    )
    assert (general_samples(before, after), general_change(before, after)) == ({}, None)
    assert ends(pictured_change(before, after)) == (-3.0,) * 3
    first, second = (
        before + general_records("piqa", [0.6] * 3),
        after + general_records("piqa", [0.5] * 3),
    )
    assert ends(pictured_change(first, second)) == pytest.approx((-0.1,) * 3)


def test_without_any_choices_accuracy_stands_for_general_abilities(
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
    assert general_figure(before) == "accuracy"
    found = general_change(before, after)
    assert found is not None
    assert found.mean == pytest.approx(-0.5)


def test_p_values_are_adjusted_for_there_being_several_benchmarks(
    task_records: Maker, general_records: Maker
) -> None:
    """By hand: three all-positive benchmarks of 8, 6 and 4 items have p of 2/2⁸, 2/2⁶ and 2/2⁴, and a fourth that is noise 1.

    Benjamini and Hochberg multiply the k-th smallest of four by 4/k, and let none exceed a larger one's.
    """
    before, after = task_records([1.0]), task_records([1.0])
    for benchmark, items in {"piqa": 8, "arc_easy": 6, "lambada": 4}.items():
        before += general_records(benchmark, [0.4] * items)
        after += general_records(benchmark, [0.6 + 0.01 * number for number in range(items)])
    before, after = (
        before + general_records("openbookqa", [0.5, 0.5]),
        after + general_records("openbookqa", [0.6, 0.4]),
    )
    found = change(before, after).benchmarks
    assert [one.p_value for one in found.values()] == pytest.approx(
        [2 / 256, 2 / 64, 2 / 16, 1.0], abs=1e-6
    )
    assert [one.adjusted_p for one in found.values()] == pytest.approx(
        [4 * 2 / 256, 2 * 2 / 64, 4 / 3 * 2 / 16, 1.0], abs=1e-6
    )


def test_the_gain_share_is_of_the_control_over_the_base(task_records: Maker) -> None:
    base, control, adapter = (task_records([loss] * 4) for loss in (4.0, 2.0, 3.0))
    assert ends(gain_share(base, control, adapter)) == pytest.approx((0.5,) * 3)
    assert ends(gain_share(base, control, control)) == pytest.approx((1.0,) * 3)
    assert ends(gain_share(base, control, base)) == pytest.approx((0.0,) * 3)


@pytest.mark.parametrize(
    "losses", [[4.0] * 4, [4.5] * 4, [4.5, 3.0, 4.4, 3.9]], ids=["nothing", "a loss", "not surely"]
)
def test_a_control_that_did_not_surely_learn_gives_no_share(
    task_records: Maker, losses: list[float]
) -> None:
    assert (
        gain_share(task_records([4.0] * 4), task_records(losses), task_records([3.0] * 4)) is None
    )


def test_each_model_is_held_against_the_base_it_was_trained_on(general_records: Maker) -> None:
    dense, control, quantized, adapter = (
        general_records("piqa", [p] * 4) for p in (0.6, 0.58, 0.5, 0.45)
    )
    assert ends(drop_beyond_control((dense, quantized), control, adapter)) == pytest.approx(
        (-0.05 + 0.02,) * 3
    )
