"""Each rule of the gate passes at its bound, rejects below, and can't tell in between."""

from dataclasses import replace
from typing import Any

import pytest

from pipelines.comparison.criterion import RuleResult
from pipelines.comparison.gate import Evidence, OpenChange, decide
from pipelines.comparison.resampling import Interval
from pipelines.config.sections import GateSection

GATE = GateSection(
    min_gain_share=0.5,
    max_general_drop=0.03,
    max_drop_beyond_control=0.03,
    max_file_mb=20.0,
    max_rank=64,
    min_gain_over_champion=0.01,
)
LEARNED = "learned enough"
GAINED = "gained on the task"
LITTLE = "forgot little"
BEYOND_CONTROL = "forgot little more than the control"
PROBE = "forgot little of capitals"
TASK = "forgot little of perplexity"
FILE = "the file is small enough"
RANK = "the rank can be served"
CHAMPION = "beats the champion"
METRICS = "all metrics could be computed"
EVERY = [LEARNED, LITTLE, BEYOND_CONTROL, FILE, RANK, CHAMPION, METRICS]
NAN = Interval(float("nan"), float("nan"), float("nan"))
GOOD = Evidence(
    control="full",
    task_gain=Interval(0.8, 0.7, 0.9),
    gain_share=Interval(0.8, 0.7, 0.9),
    general=Interval(0.0, -0.02, 0.02),
    general_metric="choice_probability",
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
WITHOUT_CONTROL = replace(GOOD, control="none", gain_share=None, beyond_control=None)
FORGETFUL = replace(GOOD, general=Interval(-0.06, -0.09, -0.04))


def probe(*interval: float) -> dict[str, Any]:
    """Return the change of a benchmark with right and wrong answers."""
    return {"open_changes": (OpenChange("capitals", Interval(*interval), None, 20),)}


def task(*interval: float, scale: float = 10.0) -> dict[str, Any]:
    """Return the change of a task with its own score, for a base with a mean score of `scale`."""
    return {"open_changes": (OpenChange("perplexity", Interval(*interval), scale, 20),)}


def rule(evidence: Evidence, name: str) -> RuleResult:
    return next(one for one in decide(evidence, GATE).rules if one.name == name)


def rule_names(evidence: Evidence, **gate: float | None) -> list[str]:
    return [one.name for one in decide(evidence, GATE.model_copy(update=gate)).rules]


def without(*names: str) -> list[str]:
    return [name for name in EVERY if name not in names]


@pytest.mark.parametrize(
    ("name", "changes", "status"),
    [
        (LEARNED, {"gain_share": Interval(0.6, 0.51, 0.7)}, "pass"),
        (LEARNED, {"gain_share": Interval(0.5, 0.5, 0.5)}, "pass"),
        (LEARNED, {"gain_share": Interval(0.6, 0.49, 0.7)}, "can't tell"),
        (LEARNED, {"gain_share": Interval(0.45, 0.4, 0.5)}, "can't tell"),
        (LEARNED, {"gain_share": Interval(0.45, 0.4, 0.499)}, "reject"),
        (LEARNED, {"gain_share": Interval(2.7, 2.0, 3.0)}, "pass"),
        (LEARNED, {"gain_share": None}, "can't tell"),
        (LEARNED, {"gain_share": NAN}, "can't tell"),
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
        (LITTLE, {"general": NAN}, "can't tell"),
        (BEYOND_CONTROL, {"beyond_control": Interval(-0.02, -0.03, 0.0)}, "pass"),
        (BEYOND_CONTROL, {"beyond_control": Interval(-0.04, -0.07, -0.01)}, "can't tell"),
        (BEYOND_CONTROL, {"beyond_control": Interval(-0.06, -0.09, -0.031)}, "reject"),
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
def test_a_rule_decides_by_an_end_of_its_interval(
    name: str, changes: dict[str, Any], status: str
) -> None:
    verdict = decide(replace(GOOD, **changes), GATE)
    statuses = {one.name: one.status for one in verdict.rules}
    assert statuses.pop(name) == status
    assert set(statuses.values()) == {"pass"}
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
def test_without_a_control_the_task_gain_must_be_significant(gain: Interval, status: str) -> None:
    evidence = replace(WITHOUT_CONTROL, task_gain=gain)
    assert rule(evidence, GAINED).status == status
    assert decide(evidence, GATE).status == status


def test_a_rule_that_does_not_apply_is_not_listed() -> None:
    assert rule_names(GOOD) == EVERY
    assert rule_names(WITHOUT_CONTROL) == [GAINED, *without(LEARNED, BEYOND_CONTROL)]
    assert rule_names(GOOD, max_file_mb=None, max_rank=None) == without(FILE, RANK)
    assert rule_names(GOOD, min_gain_over_champion=None) == without(CHAMPION)
    assert rule_names(replace(GOOD, over_champion=None)) == without(CHAMPION)
    assert rule_names(replace(GOOD, answers=0)) == without(METRICS)


def test_a_pass_gives_the_reason_of_every_rule() -> None:
    verdict = decide(GOOD, GATE)
    assert verdict.status == "pass"
    assert verdict.reason == "; ".join(one.reason for one in verdict.rules)


def test_one_failure_rejects_whatever_is_undecided() -> None:
    evidence = replace(FORGETFUL, gain_share=Interval(0.6, 0.4, 0.8))
    verdict = decide(evidence, GATE)
    assert verdict.status == "reject"
    assert verdict.reason == rule(evidence, LITTLE).reason


def test_a_rejection_gives_the_reason_of_every_failure() -> None:
    verdict = decide(replace(GOOD, gain_share=Interval(0.4, 0.3, 0.45), rank=128), GATE)
    assert verdict.reason == (
        "40% of the control's gain (0.300 to 0.450), but it must be at least 50%; "
        "rank 128, but it must be at most 64"
    )


def test_one_benchmark_that_dropped_rejects_although_others_did_not() -> None:
    changes = (
        *probe(0.0, -0.01, 0.01)["open_changes"],
        *task(-2.0, -3.0, -1.0)["open_changes"],
    )
    both = replace(GOOD, open_changes=changes)
    assert rule(both, PROBE).status == "pass"
    assert rule(both, TASK).status == "reject"
    assert decide(both, GATE).status == "reject"


def test_tasks_with_their_own_score_replace_the_general_change() -> None:
    only = replace(GOOD, general=None, beyond_control=None, items=0, **task(0.1, -0.1, 0.3))
    assert rule_names(only) == [LEARNED, TASK, FILE, RANK, CHAMPION, METRICS]
    assert decide(only, GATE).status == "pass"


@pytest.mark.parametrize(
    ("evidence", "bounds", "status"),
    [
        (FORGETFUL, {"max_general_drop": 0.2}, "pass"),
        (FORGETFUL, {"max_general_drop": 0.01}, "reject"),
        (GOOD, {"min_gain_share": 0.95}, "reject"),
        (GOOD, {"max_drop_beyond_control": 0.0}, "can't tell"),
        (GOOD, {"min_gain_over_champion": 0.1}, "reject"),
    ],
)
def test_the_bounds_are_those_of_the_gate(
    evidence: Evidence, bounds: dict[str, float], status: str
) -> None:
    assert decide(evidence, GATE.model_copy(update=bounds)).status == status


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
def test_a_rule_reports_whether_more_items_would_decide(
    changes: dict[str, Any], beyond: bool
) -> None:
    rules = decide(replace(GOOD, **changes), GATE).rules
    undecided = [one.beyond_items for one in rules if one.status == "can't tell"]
    assert undecided == [beyond]
    assert not any(one.beyond_items for one in decide(GOOD, GATE).rules)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"general": Interval(-0.06, -0.09, -0.04)},
            "general change -0.060 (-0.090 to -0.040), but it must be at least -0.030",
        ),
        ({"file_bytes": 538_400_000}, "a file of 538 MB, but it must be at most 20 MB"),
        (
            {"gain_share": Interval(0.55, 0.45, 0.65)},
            "55% of the control's gain (0.450 to 0.650) contains the bound (at least 50%): "
            "about 380 held-out examples (now 48) would decide",
        ),
        (
            # By hand: ±0.4 around −0.1, compared with −0.03:
            # 20 · (0.4 · 2.8016 / 2.0930 / 0.07)² + 1.92 = 1171.8 items.
            probe(-0.1, -0.5, 0.3),
            "change of accuracy on capitals -0.100 (-0.500 to 0.300) contains the bound "
            "(at least -0.030): about 1,200 items of capitals (now 20) would decide",
        ),
        (
            task(-2.0, -3.0, -1.0),
            "change of score on perplexity -2.000 (-3.000 to -1.000), "
            "but it must be at least -0.300, 3% of the base's 10.000",
        ),
        (
            {"errors": tuple(f"execution of answer {n}: no such program" for n in range(5))},
            "not every metric could be computed: execution of answer 0: no such program; "
            "execution of answer 1: no such program; execution of answer 2: no such program; "
            "and 2 more",
        ),
    ],
    ids=["general", "file", "gain", "probe", "task", "errors"],
)
def test_the_reason_of_a_verdict(changes: dict[str, Any], reason: str) -> None:
    assert decide(replace(GOOD, **changes), GATE).reason == reason


def test_the_reason_names_accuracy_as_the_general_metric() -> None:
    reason = rule(replace(GOOD, general_metric="accuracy"), LITTLE).reason
    assert reason.startswith("general change of accuracy +0.000")


def test_the_reason_of_the_comparison_with_the_control() -> None:
    result = rule(replace(GOOD, beyond_control=Interval(-0.02, -0.025, 0.0)), BEYOND_CONTROL)
    assert result.status == "pass"
    expected = "-0.020 relative to the control (-0.025 to 0.000; at least -0.030)"
    assert result.reason == expected


def test_a_benchmark_name_with_braces_is_printed_unchanged() -> None:
    change = OpenChange("{value} {0}", Interval(-1.0, -1.0, -1.0), None, 20)
    reason = decide(replace(GOOD, open_changes=(change,)), GATE).reason
    assert reason.startswith("change of accuracy on {value} {0} -1.000")
