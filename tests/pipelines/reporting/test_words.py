"""The headline gives correct advice: it recommends more items only if more items can decide."""

from collections.abc import Callable
from typing import Any

import pytest
from summaries import control_by_lora, no_champion, no_control, nothing_kept, parsed
from summary_parts import verified

from pipelines.comparison.document import Summary
from pipelines.reporting.page_sections import verified as verified_rows
from pipelines.reporting.words import headline, recommended_text, verified_text

Values = dict[str, Any]
MakeSummary = Callable[..., Summary]
UNSURE = {
    "name": "forgot little",
    "status": "can't tell",
    "reason": "with about 830 items (now 180) it could be told",
}
FAILED = {
    "name": "all metrics could be computed",
    "status": "can't tell",
    "reason": "not every metric could be computed: it raised.",
    "beyond_items": True,
}
GOOD = {
    "name": "learned enough",
    "status": "pass",
    "reason": "80% of the control's gain",
    "beyond_items": False,
}
NOT_REJECTED = "No adapter is put forward; rank-4 was not rejected, "


@pytest.fixture
def undecided(summary: Values) -> MakeSummary:
    """Return a function that builds a summary whose candidate is undecided by some rules."""

    def build(*rules: Values) -> Summary:
        verdict = {"status": "can't tell", "reason": "", "rules": list(rules)}
        summary["models"]["rank-4"]["judgment"]["verdict"] = verdict
        return parsed(summary | {"champion": None, "candidate": "rank-4", "recommended": None})

    return build


@pytest.fixture
def decided(summary: Values) -> MakeSummary:
    """Return a function that builds a summary with champion rank-16, from the recommendation."""

    def build(**recommended: Any) -> Summary:
        return parsed(summary | {"recommended": recommended})

    return build


def test_more_items_are_recommended_if_they_can_decide(undecided: MakeSummary) -> None:
    expected = NOT_REJECTED + "and scoring more items would decide."
    assert headline(undecided(GOOD, UNSURE)) == expected
    assert headline(undecided(GOOD, {**UNSURE, "beyond_items": False})) == expected


def test_problem_that_items_cannot_solve_is_named(undecided: MakeSummary) -> None:
    reason = "not every metric could be computed: it raised."
    expected = f"{NOT_REJECTED}but more items cannot decide whether it passes: {reason}"
    assert headline(undecided(GOOD, FAILED)) == expected
    assert headline(undecided(UNSURE, FAILED)) == expected


def test_champion_and_recommended_do_not_contradict_each_other(decided: MakeSummary) -> None:
    reason = "rank-4 has the lowest rank that does"
    summary = decided(label="rank-4", reason=reason, gives_up=0.0312)
    assert headline(summary).startswith("Use rank-16: ")
    smaller = "rank-4 is smaller and gives up at most 4\u00a0% of the gain."
    assert headline(summary).endswith(f"than the gate allows; {smaller}")
    assert recommended_text(summary) == f"Recommended where size counts: {reason}."


def test_champion_that_is_recommended_is_named_once(decided: MakeSummary) -> None:
    summary = decided(label="rank-16", reason="rank-16 gains most", gives_up=None)
    assert headline(summary).endswith("it forgot no more than the gate allows.")
    assert recommended_text(summary) == "Recommended: rank-16 gains most."


def test_headline_compares_the_champion_with_full_fine_tuning(summary: Values) -> None:
    expected = (
        "Use rank-16: by training 3.6\u00a0% as many weights it learned 84\u00a0% of what full"
    )
    assert headline(parsed(summary)).startswith(expected)
    assert headline(parsed(summary)).endswith("it forgot no more than the gate allows.")


def test_headline_names_a_smaller_alternative(summary: Values) -> None:
    summary["recommended"] = {"label": "rank-4", "reason": "it does"}
    expected = "than the gate allows; rank-4 is smaller and not clearly worse."
    assert headline(parsed(summary)).endswith(expected)


def test_headline_names_the_rank_of_a_lora_control(summary: Values) -> None:
    control_by_lora(summary)
    assert "of what the control, an adapter of rank 128, learned" in headline(parsed(summary))


def test_headline_without_a_control_gives_the_gain(summary: Values) -> None:
    no_control(summary)
    assert "it gained 0.723 nats per token on the task" in headline(parsed(summary))


def test_headline_without_a_champion(summary: Values) -> None:
    no_champion(summary)
    expected = "rank-16 was not rejected, and scoring more items would decide."
    assert headline(parsed(summary)) == f"No adapter is put forward; {expected}"
    nothing_kept(summary)
    assert headline(parsed(summary)) == "No adapter is put forward."


def test_verified_readers_are_described(summary: Values) -> None:
    assert verified_text(parsed(summary)) == ""
    slow = verified("one by one", rejected=("packs differ",)) | {"loss_difference": 2e-4}
    summary["forward"] = {
        "base": {"training": None, "scoring": verified()},
        "rank-4": {"training": verified(), "scoring": slow},
    }
    expected = (
        "Training and scoring match the models' own forward within 2e-04 nats per token; "
        "read one example at a time: rank-4."
    )
    assert verified_text(parsed(summary)) == expected
    rows = verified_rows(parsed(summary))
    assert [name for name, _ in rows] == ["base, scoring", "rank-4, training", "rank-4, scoring"]
    assert verified_rows(parsed(summary), "rank-4") == rows[1:]
    assert rows[-1][1].startswith("slow path (one example at a time) matches")
    assert rows[-1][1].endswith("; packs differ")
    peft = {"name": "peft", "difference": 3e-7}
    limits = {"library": "PEFT 1", "examples": 8, "noise_floor": 1e-7, "tolerance": 1e-5}
    summary["forward"]["rank-4"]["served"] = {**limits, "formats": [peft]}
    name, text = verified_rows(parsed(summary))[-1]
    assert name == "rank-4, exports" and text.startswith("served = trained: PEFT 1 on 8 ")
