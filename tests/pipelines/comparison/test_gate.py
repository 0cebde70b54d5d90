"""Each rule passes at its bound, rejects below it, and says it can't tell in between, with what it would take."""

from dataclasses import replace
from typing import Any

import pytest

from pipelines.comparison.gate import Evidence, OpenChange, Rule, decide
from pipelines.comparison.resampling import Interval

GATE = {
    "min_gain_share": 0.5,
    "max_general_drop": 0.03,
    "max_drop_beyond_control": 0.03,
    "max_file_mb": 20.0,
    "max_rank": 64,
    "min_gain_over_champion": 0.01,
}
LEARNT, SURELY, LITTLE, HARDLY_MORE = (
    "learnt enough",
    "surely learnt",
    "forgot little",
    "forgot hardly more than the control",
)
PROBE, TASK = "forgot little of capitals", "forgot little of perplexity"
FILE, RANK, CHAMPION, METRICS = (
    "the file is small enough",
    "the rank can be served",
    "beats the champion",
    "all metrics could be computed",
)
GOOD = Evidence(
    control="full",
    task_gain=Interval(0.8, 0.7, 0.9),
    gain_share=Interval(0.8, 0.7, 0.9),
    general=Interval(0.0, -0.02, 0.02),
    general_figure="choice_probability",
    beyond_control=Interval(0.0, -0.02, 0.02),
    open_changes=(),
    file_bytes=5_000_000,
    rank=16,
    over_champion=Interval(0.05, 0.02, 0.08),
    champion_objection=None,
    errors=(),
    examples=48,
    items=180,
    answers=16,
)


def probe(*interval: float) -> dict[str, Any]:
    """Return the change of a benchmark whose answers are right or wrong."""
    return {"open_changes": (OpenChange("capitals", Interval(*interval), None, 20),)}


def task(*interval: float, scale: float = 10.0) -> dict[str, Any]:
    """Return the change of a benchmark that rates itself, of a base whose mean score is ten."""
    return {"open_changes": (OpenChange("perplexity", Interval(*interval), scale, 20),)}


ALONE = replace(GOOD, control="none", gain_share=None, beyond_control=None)
EVERY = [LEARNT, LITTLE, HARDLY_MORE, FILE, RANK, CHAMPION, METRICS]


def rule(evidence: Evidence, name: str, gate: dict[str, Any] = GATE) -> Rule:
    return next(one for one in decide(evidence, gate).rules if one.name == name)


def names(evidence: Evidence, gate: dict[str, Any] = GATE) -> list[str]:
    return [one.name for one in decide(evidence, gate).rules]


@pytest.mark.parametrize(
    ("name", "changes", "status"),
    [
        (LEARNT, {"gain_share": Interval(0.6, 0.51, 0.7)}, "pass"),
        (LEARNT, {"gain_share": Interval(0.5, 0.5, 0.5)}, "pass"),
        (LEARNT, {"gain_share": Interval(0.6, 0.49, 0.7)}, "can't tell"),
        (LEARNT, {"gain_share": Interval(0.45, 0.4, 0.5)}, "can't tell"),
        (LEARNT, {"gain_share": Interval(0.45, 0.4, 0.499)}, "reject"),
        (LEARNT, {"gain_share": Interval(2.7, 2.0, 3.0)}, "pass"),
        (LEARNT, {"gain_share": None}, "can't tell"),
        (LEARNT, {"gain_share": Interval(float("nan"), float("nan"), float("nan"))}, "can't tell"),
        (
            CHAMPION,
            {"over_champion": None, "champion_objection": "it was trained on another base"},
            "can't tell",
        ),
        (LITTLE, {"general": Interval(-0.02, -0.029, 0.0)}, "pass"),
        (LITTLE, {"general": Interval(-0.03, -0.03, -0.03)}, "pass"),
        (LITTLE, {"general": Interval(-0.02, -0.031, 0.01)}, "can't tell"),
        (LITTLE, {"general": Interval(-0.05, -0.07, -0.03)}, "can't tell"),
        (LITTLE, {"general": Interval(-0.05, -0.07, -0.031)}, "reject"),
        (LITTLE, {"general": Interval(0.1, 0.05, 0.2)}, "pass"),
        (LITTLE, {"general": None, "beyond_control": None, "items": 0}, "can't tell"),
        (LITTLE, {"general": Interval(float("nan"), float("nan"), float("nan"))}, "can't tell"),
        (HARDLY_MORE, {"beyond_control": Interval(-0.02, -0.03, 0.0)}, "pass"),
        (HARDLY_MORE, {"beyond_control": Interval(-0.04, -0.07, -0.01)}, "can't tell"),
        (HARDLY_MORE, {"beyond_control": Interval(-0.06, -0.09, -0.031)}, "reject"),
        (PROBE, probe(-0.02, -0.03, 0.0), "pass"),
        (PROBE, probe(-0.02, -0.031, 0.0), "can't tell"),
        (PROBE, probe(-0.3, -0.6, -0.03), "can't tell"),
        (PROBE, probe(-0.3, -0.6, -0.031), "reject"),
        (PROBE, probe(-1.0, -1.0, -1.0), "reject"),
        (TASK, task(-0.2, -0.3, 0.0), "pass"),
        (TASK, task(5.0, 2.0, 8.0), "pass"),
        (TASK, task(-0.2, -0.301, 0.0), "can't tell"),
        (TASK, task(-0.5, -0.7, -0.3), "can't tell"),
        (TASK, task(-0.5, -0.7, -0.301), "reject"),
        (TASK, task(-0.5, -0.7, -0.301, scale=100.0), "pass"),
        (TASK, task(0.0, 0.0, 0.0, scale=0.0), "pass"),
        (TASK, task(-0.001, -0.002, -0.001, scale=0.0), "reject"),
        (FILE, {"file_bytes": 20_000_000}, "pass"),
        (FILE, {"file_bytes": 20_000_001}, "reject"),
        (RANK, {"rank": 64}, "pass"),
        (RANK, {"rank": 65}, "reject"),
        (CHAMPION, {"over_champion": Interval(0.02, 0.01, 0.03)}, "pass"),
        (CHAMPION, {"over_champion": Interval(0.02, 0.009, 0.03)}, "can't tell"),
        (CHAMPION, {"over_champion": Interval(0.0, -0.01, 0.009)}, "reject"),
        (METRICS, {"errors": ("execution of answer 3: no such program",)}, "can't tell"),
    ],
)
def test_a_rule_is_held_against_an_end_of_its_interval(
    name: str, changes: dict[str, Any], status: str
) -> None:
    verdict = decide(replace(GOOD, **changes), GATE)
    others = {one.name: one.status for one in verdict.rules if one.name != name}
    assert {one.name: one.status for one in verdict.rules if one.name == name} == {name: status}
    assert set(others.values()) == {"pass"}
    assert verdict.status == status


@pytest.mark.parametrize(
    ("gain", "status"),
    [
        (Interval(0.2, 0.1, 0.3), "pass"),
        (Interval(0.2, 1e-6, 0.3), "pass"),
        (Interval(0.2, 0.0, 0.3), "can't tell"),
        (Interval(0.0, -0.1, 0.1), "can't tell"),
        (Interval(0.0, 0.0, 0.0), "reject"),
        (Interval(-0.2, -0.3, -0.1), "reject"),
    ],
)
def test_without_a_control_an_adapter_must_surely_have_learnt(gain: Interval, status: str) -> None:
    evidence = replace(ALONE, task_gain=gain)
    assert rule(evidence, SURELY).status == status
    assert decide(evidence, GATE).status == status


def test_a_rule_that_does_not_apply_is_not_listed() -> None:
    assert names(GOOD) == EVERY
    assert names(ALONE) == [SURELY, LITTLE, FILE, RANK, CHAMPION, METRICS]
    assert names(GOOD, {**GATE, "max_file_mb": None, "max_rank": None}) == [
        LEARNT,
        LITTLE,
        HARDLY_MORE,
        CHAMPION,
        METRICS,
    ]
    assert names(GOOD, {**GATE, "min_gain_over_champion": None}) == [
        LEARNT,
        LITTLE,
        HARDLY_MORE,
        FILE,
        RANK,
        METRICS,
    ]
    assert names(replace(GOOD, over_champion=None)) == [
        LEARNT,
        LITTLE,
        HARDLY_MORE,
        FILE,
        RANK,
        METRICS,
    ]
    assert names(replace(GOOD, answers=0)) == [LEARNT, LITTLE, HARDLY_MORE, FILE, RANK, CHAMPION]


def test_all_good_passes_and_every_rule_says_why() -> None:
    verdict = decide(GOOD, GATE)
    assert verdict.status == "pass"
    assert verdict.reason == "; ".join(one.reason for one in verdict.rules)


def test_one_failure_rejects_whatever_else_cannot_be_told() -> None:
    unclear, forgetful = (
        {"gain_share": Interval(0.6, 0.4, 0.8)},
        {"general": Interval(-0.06, -0.09, -0.04)},
    )
    verdict = decide(replace(GOOD, **unclear, **forgetful), GATE)
    assert verdict.status == "reject"
    assert verdict.reason == rule(replace(GOOD, **forgetful), LITTLE).reason


def test_every_failure_is_named() -> None:
    verdict = decide(replace(GOOD, gain_share=Interval(0.4, 0.3, 0.45), rank=128), GATE)
    assert verdict.reason == (
        "40% of the control's gain (0.300 to 0.450), but the rule is at least 50%; rank 128, but the rule is at most 64"
    )


def test_a_rejection_for_forgetting_names_figure_interval_and_bound() -> None:
    reason = decide(replace(GOOD, general=Interval(-0.06, -0.09, -0.04)), GATE).reason
    assert reason == "general change -0.060 (-0.090 to -0.040), but the rule is no less than -0.030"


def test_a_general_change_of_accuracy_is_called_so() -> None:
    reason = rule(replace(GOOD, general_figure="accuracy"), LITTLE).reason
    assert reason.startswith("general change of accuracy +0.000")


def test_a_file_is_told_in_megabytes() -> None:
    assert (
        rule(replace(GOOD, file_bytes=538_400_000), FILE).reason
        == "a file of 538 MB, but the rule is at most 20 MB"
    )


def test_what_cannot_be_told_says_how_many_items_would_tell() -> None:
    """By hand: ±0.03 around −0.01 held against −0.03 takes 180 · (0.03 · 2.8016 / 1.9733 / 0.02)² + 1.92 = 818.4 items."""
    reason = decide(replace(GOOD, general=Interval(-0.01, -0.04, 0.02)), GATE).reason
    assert reason == (
        "general change -0.010 (-0.040 to 0.020) spans the bound (no less than -0.030): with about 820 items (now 180) it could be told"
    )


def test_what_cannot_be_told_of_the_task_asks_for_held_out_examples() -> None:
    reason = decide(replace(GOOD, gain_share=Interval(0.55, 0.45, 0.65)), GATE).reason
    assert reason.endswith("with about 380 held-out examples (now 48) it could be told")


def test_many_items_are_told_in_thousands() -> None:
    assert (
        "with about 14,000 items (now 180)"
        in decide(replace(GOOD, general=Interval(-0.025, -0.055, 0.005)), GATE).reason
    )


@pytest.mark.parametrize("mean", [-0.03, -0.0299])
def test_what_no_sensible_sample_would_tell_asks_for_none(mean: float) -> None:
    reason = decide(replace(GOOD, general=Interval(mean, -0.06, 0.0)), GATE).reason
    assert reason.endswith(
        "so close that even 100 times the 180 items would not tell; set another bound, or judge it yourself"
    )


def test_metrics_that_failed_are_named_with_their_answers() -> None:
    errors = tuple(f"execution of answer {number}: no such program" for number in range(5))
    reason = decide(replace(GOOD, errors=errors), GATE).reason
    assert reason == (
        "not every metric could be computed: execution of answer 0: no such program; execution of answer 1: no such program; "
        "execution of answer 2: no such program; and 2 more"
    )


def test_the_bounds_are_those_of_the_gate() -> None:
    forgetful = replace(GOOD, general=Interval(-0.06, -0.09, -0.04))
    assert decide(forgetful, {**GATE, "max_general_drop": 0.2}).status == "pass"
    assert decide(forgetful, {**GATE, "max_general_drop": 0.01}).status == "reject"
    assert decide(GOOD, {**GATE, "min_gain_share": 0.95}).status == "reject"
    assert decide(GOOD, {**GATE, "max_drop_beyond_control": 0.0}).status == "can't tell"
    assert decide(GOOD, {**GATE, "min_gain_over_champion": 0.1}).status == "reject"


def test_open_questions_are_told_by_benchmark_and_in_their_own_scale() -> None:
    """By hand: ±0.4 around −0.1 held against −0.03 takes 20 · (0.4 · 2.8016 / 2.0930 / 0.07)² + 1.92 = 1171.8 items."""
    unclear = decide(replace(GOOD, **probe(-0.1, -0.5, 0.3)), GATE)
    assert unclear.reason == (
        "change of accuracy on capitals -0.100 (-0.500 to 0.300) spans the bound (no less than -0.030): "
        "with about 1,200 items of capitals (now 20) it could be told"
    )
    fallen = decide(replace(GOOD, **task(-2.0, -3.0, -1.0)), GATE)
    assert fallen.reason == (
        "change of score on perplexity -2.000 (-3.000 to -1.000), but the rule is no less than -0.300, 3% of the base's 10.000"
    )


def test_one_benchmark_that_fell_rejects_though_others_did_not() -> None:
    both = replace(
        GOOD,
        open_changes=(
            *probe(0.0, -0.01, 0.01)["open_changes"],
            *task(-2.0, -3.0, -1.0)["open_changes"],
        ),
    )
    assert [rule(both, name).status for name in (PROBE, TASK)] == ["pass", "reject"]
    assert decide(both, GATE).status == "reject"


def test_a_name_with_braces_is_told_as_it_is() -> None:
    odd = OpenChange("{value} {0}", Interval(-1.0, -1.0, -1.0), None, 20)
    assert decide(replace(GOOD, open_changes=(odd,)), GATE).reason.startswith(
        "change of accuracy on {value} {0} -1.000"
    )


def test_where_only_tasks_that_rate_themselves_were_asked_they_are_the_rule() -> None:
    only = replace(GOOD, general=None, beyond_control=None, items=0, **task(0.1, -0.1, 0.3))
    assert names(only) == [LEARNT, TASK, FILE, RANK, CHAMPION, METRICS]
    assert decide(only, GATE).status == "pass"


def test_the_rule_beside_the_control_names_what_it_allows() -> None:
    one = rule(replace(GOOD, beyond_control=Interval(-0.02, -0.025, 0.0)), HARDLY_MORE)
    assert (one.status, one.reason) == (
        "pass",
        "-0.020 against the control (-0.025 to 0.000; no less than -0.030)",
    )


@pytest.mark.parametrize(
    ("changes", "beyond"),
    [
        ({"general": Interval(-0.02, -0.04, 0.0)}, False),
        ({"gain_share": Interval(0.6, 0.4, 0.8)}, False),
        (probe(-0.1, -0.5, 0.3), False),
        ({"general": Interval(-0.03, -0.06, 0.0)}, True),
        ({"general": None, "beyond_control": None, "items": 0}, True),
        ({"gain_share": None}, True),
        ({"champion_objection": "it was trained on another base"}, True),
        ({"errors": ("execution of answer 3: no such program",)}, True),
    ],
)
def test_a_rule_says_whether_more_items_would_tell(changes: dict[str, Any], beyond: bool) -> None:
    undecided = [
        one for one in decide(replace(GOOD, **changes), GATE).rules if one.status == "can't tell"
    ]
    assert [one.beyond_items for one in undecided] == [beyond]
    assert not any(one.beyond_items for one in decide(GOOD, GATE).rules)
