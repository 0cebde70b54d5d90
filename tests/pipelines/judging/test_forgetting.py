"""Every figure of the forgetting check by hand on a small case; the intervals hold the truth as often as they claim to.

What is compared is paired, what did not change shows no change, and the gate says of each rule which figure met which bound.
"""

from collections.abc import Callable
from math import exp, log
from typing import Any

import numpy as np
import pytest

from pipelines.judging.forgetting import (
    LENGTH_NORMALISED,
    Interval,
    change,
    choice_probability,
    decide,
    drop_beyond_control,
    gain_share,
    is_right,
    margin,
    scores,
)

Values = dict[str, Any]
Records = list[Values]
Maker = Callable[..., Records]
GATE = {"min_gain_share": 0.5, "max_general_drop": 0.03, "max_drop_beyond_control": 0.03}
GOOD_SHARE, GOOD_CHANGE = Interval(0.8, 0.7, 0.9), Interval(0.0, -0.02, 0.02)


def question(log_likelihoods: list[float], *, gold: int = 0, benchmark: str = "piqa", **changes: Any) -> Values:
    sizes = [1] * len(log_likelihoods)
    return {
        "benchmark": benchmark,
        "log_likelihoods": log_likelihoods,
        "gold": gold,
        "bytes": sizes,
        "greedy": [False] * len(sizes),
        **changes,
    }


def generations(*values: float) -> Records:
    return [{"kind": "generation", "id": number, "chrf": value, "rouge_l": value / 2} for number, value in enumerate(values)]


def ends(interval: Interval | None) -> tuple[float, float, float]:
    assert interval is not None
    return interval.mean, interval.low, interval.high


@pytest.mark.parametrize("shift", [0.0, -1000.0, 700.0])
def test_choice_probability_is_the_share_of_the_right_answer(shift: float) -> None:
    record = question([log(0.2) + shift, log(0.05) + shift, log(0.15) + shift])
    assert choice_probability(record) == pytest.approx(0.5)
    assert choice_probability({**record, "gold": 2}) == pytest.approx(0.375)


def test_choice_probabilities_of_all_answers_add_up_to_one() -> None:
    values = [-3.0, -1.0, -2.5, -9.0]
    assert sum(choice_probability(question(values, gold=gold)) for gold in range(4)) == pytest.approx(1)


def test_choice_probability_of_a_lone_answer_is_one() -> None:
    assert choice_probability(question([-5.0])) == 1


@pytest.mark.parametrize("benchmark", LENGTH_NORMALISED)
def test_answers_of_unlike_length_are_compared_by_byte(benchmark: str) -> None:
    record = question([-4.0, -6.0], bytes=[2, 6], benchmark=benchmark)
    assert is_right({**record, "gold": 1}) == 1
    assert is_right({**record, "gold": 0}) == 0


def test_answers_of_winogrande_are_compared_as_they_are() -> None:
    record = question([-4.0, -6.0], bytes=[2, 6], benchmark="winogrande")
    assert (is_right({**record, "gold": 0}), is_right({**record, "gold": 1})) == (1, 0)


@pytest.mark.parametrize(("greedy", "right"), [([True, False], 1), ([False, True], 0), ([False, False], 0)])
def test_an_answer_of_lambada_is_right_where_it_is_the_likeliest_of_all_words(greedy: list[bool], right: float) -> None:
    assert is_right(question([-1.0, -9.0], benchmark="lambada", greedy=greedy)) == right


def test_the_margin_is_per_byte_and_to_the_best_wrong_answer() -> None:
    record = question([-4.0, -6.0, -3.0], bytes=[2, 4, 1])
    assert margin(record) == pytest.approx(-2.0 - -1.5)
    assert margin({**record, "gold": 1}) == pytest.approx(-1.5 - -2.0)


def test_the_task_loss_weighs_tokens_and_not_examples(task_records: Maker, general_records: Maker) -> None:
    figures = scores(task_records([3.0, 1.0], [2, 6]) + general_records("piqa", [0.5]))
    assert figures.task_loss == pytest.approx((6 + 6) / 8)


def test_benchmarks_weigh_the_same_however_many_items_they_have(task_records: Maker, general_records: Maker) -> None:
    figures = scores(task_records([1.0]) + general_records("piqa", [0.4, 0.4, 0.4]) + general_records("arc_easy", [0.8]))
    assert figures.choice_probability == pytest.approx(0.6)
    assert figures.accuracy == pytest.approx(0.5)
    assert figures.margin == pytest.approx((log(0.4 / 0.6) + log(0.8 / 0.2)) / 4 / 2)
    assert figures.benchmarks["piqa"] == {"choice_probability": pytest.approx(0.4), "accuracy": 0.0, "items": 3.0}
    assert figures.benchmarks["arc_easy"] == {"choice_probability": pytest.approx(0.8), "accuracy": 1.0, "items": 1.0}


def test_answers_that_were_generated_have_a_mean_and_else_none(task_records: Maker, general_records: Maker) -> None:
    scored = task_records([1.0]) + general_records("piqa", [0.5])
    with_answers = scores(scored + generations(20.0, 40.0))
    assert (with_answers.chrf, with_answers.rouge_l) == (30.0, 15.0)
    assert (scores(scored).chrf, scores(scored).rouge_l) == (None, None)


def test_better_is_positive_in_every_figure(task_records: Maker, general_records: Maker) -> None:
    before = task_records([2.0, 2.0], [4, 6]) + general_records("piqa", [0.4, 0.4]) + generations(10.0, 10.0)
    after = task_records([1.5, 1.5], [4, 6]) + general_records("piqa", [0.7, 0.7]) + generations(30.0, 30.0)
    better, worse = change(before, after), change(after, before)
    assert ends(better.task_gain) == pytest.approx((0.5,) * 3)
    assert ends(better.choice_probability) == pytest.approx((0.3,) * 3)
    assert ends(better.accuracy) == pytest.approx((1.0,) * 3)
    assert ends(better.chrf) == pytest.approx((20.0,) * 3)
    assert ends(better.benchmarks["piqa"]) == pytest.approx((0.3,) * 3)
    assert ends(worse.task_gain) == pytest.approx((-0.5,) * 3)
    assert ends(worse.choice_probability) == pytest.approx((-0.3,) * 3)


def test_the_task_gain_is_per_token(task_records: Maker, general_records: Maker) -> None:
    rest = general_records("piqa", [0.5, 0.5])
    gain = change(task_records([2.5, 1.0], [4, 6]) + rest, task_records([2.0, 1.0], [4, 6]) + rest).task_gain
    assert gain.mean == pytest.approx(2 / 10)
    assert (gain.low, gain.high) == pytest.approx((0.0, 0.5))


def test_a_change_weighs_benchmarks_the_same_and_draws_items_within_them(task_records: Maker, general_records: Maker) -> None:
    """Constant differences inside each benchmark leave nothing to chance, however the benchmarks differ."""
    rest = task_records([1.0, 1.0])
    before = rest + general_records("piqa", [0.4] * 5) + general_records("lambada", [0.4] * 2)
    after = rest + general_records("piqa", [0.5] * 5) + general_records("lambada", [0.7] * 2)
    assert ends(change(before, after).choice_probability) == pytest.approx((0.2,) * 3)


def test_no_change_gives_an_interval_of_nothing(task_records: Maker, general_records: Maker) -> None:
    rng = np.random.default_rng(1)
    records = (
        task_records(rng.uniform(1, 4, 12)) + general_records("piqa", rng.uniform(0.1, 0.9, 12)) + generations(*rng.uniform(0, 100, 12))
    )
    same = change(records, records)
    for interval in (same.task_gain, same.choice_probability, same.accuracy, same.chrf, *same.benchmarks.values()):
        assert ends(interval) == (0.0, 0.0, 0.0)
    assert ends(drop_beyond_control((records, records), records, records)) == (0.0, 0.0, 0.0)


def test_one_generated_answer_is_too_few_for_an_interval(task_records: Maker, general_records: Maker) -> None:
    records = task_records([1.0, 2.0]) + general_records("piqa", [0.5, 0.6])
    assert change(records + generations(1.0), records + generations(2.0)).chrf is None


def test_an_interval_is_the_same_each_time(task_records: Maker, general_records: Maker) -> None:
    rng = np.random.default_rng(1)
    first, second = (task_records(rng.uniform(1, 4, 12)) + general_records("piqa", rng.uniform(0.1, 0.9, 12)) for _ in range(2))
    assert change(first, second) == change(first, second)
    assert change(first, second).task_gain.low < change(first, second).task_gain.mean < change(first, second).task_gain.high


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r[:-1],
        lambda r: r[::-1],
        lambda r: [*r[:-1], {**r[-1], "id": "piqa/9"}],
        lambda r: [{**r[0], "kind": "generation"}, *r[1:]],
    ],
    ids=["one fewer", "another order", "another item", "another kind"],
)
def test_items_that_do_not_pair_are_refused(task_records: Maker, general_records: Maker, spoil: Callable[[Records], Records]) -> None:
    records = task_records([1.0, 2.0]) + general_records("piqa", [0.5, 0.6])
    with pytest.raises(ValueError, match="scored on different items; score both with the same seed and settings"):
        change(records, spoil(records))


def test_the_gain_share_is_of_the_control_over_the_base(task_records: Maker) -> None:
    base, control, adapter = (task_records([loss] * 4) for loss in (4.0, 2.0, 3.0))
    assert ends(gain_share(base, control, adapter)) == pytest.approx((0.5,) * 3)
    assert ends(gain_share(base, control, control)) == pytest.approx((1.0,) * 3)
    assert ends(gain_share(base, control, base)) == pytest.approx((0.0,) * 3)


def test_each_model_is_held_against_the_base_it_was_trained_on(general_records: Maker) -> None:
    dense, control, quantised, adapter = (general_records("piqa", [p] * 4) for p in (0.6, 0.58, 0.5, 0.45))
    assert ends(drop_beyond_control((dense, quantised), control, adapter)) == pytest.approx((-0.05 + 0.02,) * 3)


def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says(general_records: Maker) -> None:
    """200 samples of 40 items: 95 % of intervals should hold the truth, a percentile bootstrap of this size nearly does."""
    rng, truth, sets = np.random.default_rng(5), -0.05, 200
    flat = general_records("piqa", [0.5] * 40)
    held = 0
    for _ in range(sets):
        drawn = general_records("piqa", 0.5 + truth + rng.uniform(-0.3, 0.3, 40))
        interval = drop_beyond_control((flat, flat), flat, drawn)
        held += interval.low <= truth <= interval.high
    assert 0.90 <= held / sets <= 0.99


def test_the_interval_of_a_share_holds_the_truth_as_often_as_it_says(task_records: Maker) -> None:
    rng, truth, sets, tokens = np.random.default_rng(6), 0.7, 200, [12] * 40
    base = task_records([4.0] * 40, tokens)
    held = 0
    for _ in range(sets):
        gains = rng.uniform(0.2, 1.8, 40)
        control = task_records(list(4.0 - gains), tokens)
        adapter = task_records(list(4.0 - truth * gains + rng.normal(0, 0.3, 40)), tokens)
        interval = gain_share(base, control, adapter)
        held += interval.low <= truth <= interval.high
    assert 0.90 <= held / sets <= 0.99


@pytest.mark.parametrize(
    ("share", "general", "beyond", "status", "decisive"),
    [
        (GOOD_SHARE, GOOD_CHANGE, GOOD_CHANGE, "pass", {"learnt enough", "forgot little", "forgot no more than the control"}),
        (Interval(0.4, 0.3, 0.45), GOOD_CHANGE, GOOD_CHANGE, "reject", {"learnt enough"}),
        (GOOD_SHARE, Interval(-0.06, -0.09, -0.04), GOOD_CHANGE, "reject", {"forgot little"}),
        (GOOD_SHARE, GOOD_CHANGE, Interval(-0.06, -0.09, -0.04), "reject", {"forgot no more than the control"}),
        (Interval(0.4, 0.3, 0.45), Interval(-0.06, -0.09, -0.04), GOOD_CHANGE, "reject", {"learnt enough", "forgot little"}),
        (Interval(0.6, 0.4, 0.8), GOOD_CHANGE, GOOD_CHANGE, "can't tell", {"learnt enough"}),
        (GOOD_SHARE, Interval(-0.02, -0.05, 0.01), GOOD_CHANGE, "can't tell", {"forgot little"}),
        (GOOD_SHARE, GOOD_CHANGE, Interval(-0.04, -0.07, -0.01), "can't tell", {"forgot no more than the control"}),
        (Interval(0.6, 0.4, 0.8), Interval(-0.06, -0.09, -0.04), GOOD_CHANGE, "reject", {"forgot little"}),
        (Interval(0.5, 0.5, 0.5), Interval(-0.03, -0.03, -0.03), GOOD_CHANGE, "pass", {"learnt enough", "forgot little"}),
        (Interval(0.45, 0.4, 0.5), GOOD_CHANGE, GOOD_CHANGE, "can't tell", {"learnt enough"}),
        (Interval(exp(1), 2.0, 3.0), Interval(0.1, 0.05, 0.2), Interval(0.1, 0.05, 0.2), "pass", {"learnt enough"}),
    ],
    ids=[
        "all good",
        "learnt too little",
        "forgot too much",
        "forgot more than the control",
        "two failures",
        "learning unclear",
        "forgetting unclear",
        "beside the control unclear",
        "a failure beats what is unclear",
        "on the bound",
        "the upper end on the bound",
        "better than the control and the base",
    ],
)
def test_the_gate_decides(share: Interval, general: Interval, beyond: Interval, status: str, decisive: set[str]) -> None:
    verdict = decide(share, general, beyond, GATE)
    assert verdict.status == status
    named = [rule for rule in verdict.rules if rule.name in decisive]
    assert {rule.status for rule in named} == {status}
    assert all(rule.reason in verdict.reason for rule in named)
    assert [rule.name for rule in verdict.rules] == ["learnt enough", "forgot little", "forgot no more than the control"]
    if status != "pass":
        assert {rule.name for rule in verdict.rules if rule.status == status} == decisive


def test_a_rejection_names_figure_interval_and_bound() -> None:
    reason = decide(Interval(0.4, 0.3, 0.45), GOOD_CHANGE, GOOD_CHANGE, GATE).reason
    assert all(part in reason for part in ("40% of the control's gain", "0.300 to 0.450", "at least 50%"))


def test_a_rejection_for_forgetting_names_figure_interval_and_bound() -> None:
    reason = decide(GOOD_SHARE, Interval(-0.06, -0.09, -0.04), GOOD_CHANGE, GATE).reason
    assert all(part in reason for part in ("general change -0.060", "-0.090 to -0.040", "no less than -0.030"))


def test_what_cannot_be_told_asks_for_more_items() -> None:
    reason = decide(GOOD_SHARE, GOOD_CHANGE, Interval(-0.04, -0.07, -0.01), GATE).reason
    assert all(part in reason for part in ("-0.040 against the control", "-0.070 to -0.010", "-0.030", "score more items to tell"))


def test_the_bounds_are_those_of_the_gate() -> None:
    strict, lenient = ({**GATE, "max_general_drop": drop} for drop in (0.01, 0.2))
    forgetful = Interval(-0.06, -0.09, -0.04)
    assert decide(GOOD_SHARE, forgetful, GOOD_CHANGE, lenient).status == "pass"
    assert decide(GOOD_SHARE, forgetful, GOOD_CHANGE, strict).status == "reject"
    assert decide(GOOD_SHARE, GOOD_CHANGE, GOOD_CHANGE, {**GATE, "min_gain_share": 0.95}).status == "reject"


def test_what_is_no_number_does_not_pass() -> None:
    nothing = Interval(float("nan"), float("nan"), float("nan"))
    assert decide(nothing, GOOD_CHANGE, GOOD_CHANGE, GATE).status == "can't tell"
    assert decide(GOOD_SHARE, nothing, GOOD_CHANGE, GATE).status == "can't tell"
