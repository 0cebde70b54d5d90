"""The headline gives no false advice: it asks for items only where items are missing, and names what else is."""

from collections.abc import Callable
from typing import Any

import pytest

from pipelines.reporting.words import headline, recommended_text

Values = dict[str, Any]
Summary = Callable[..., Values]
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
    "name": "learnt enough",
    "status": "pass",
    "reason": "80% of the control's gain",
    "beyond_items": False,
}


@pytest.fixture
def undecided() -> Summary:
    """Return a maker of a summary whose only adapter is undecided by some rules."""

    def make(*rules: Values) -> Values:
        model = {"verdict": {"status": "can't tell", "reason": "", "rules": list(rules)}}
        return {
            "champion": None,
            "candidate": "rank-4",
            "models": {"rank-4": model},
            "recommended": None,
        }

    return make


@pytest.fixture
def decided() -> Summary:
    """Return a maker of a summary whose champion is rank-16, from what is recommended."""

    def make(**recommended: Any) -> Values:
        model = {"figures": {"trained_weights": 1e6}, "gain_share": {"mean": 0.8}}
        found = {
            "champion": "rank-16",
            "candidate": "rank-16",
            "models": {"rank-16": model},
            "recommended": recommended,
        }
        return {**found, "base": {"weights": 1e8}, "control": {"method": "full"}}

    return make


def test_items_are_asked_for_where_they_would_tell(undecided: Summary) -> None:
    for rules in ([GOOD, UNSURE], [GOOD, {**UNSURE, "beyond_items": False}]):
        assert (
            headline(undecided(*rules))
            == "No adapter is put forward; rank-4 was not rejected, and scoring more items would tell."
        )


def test_what_no_item_would_tell_is_named(undecided: Summary) -> None:
    expected = "No adapter is put forward; rank-4 was not rejected, but it cannot be told to pass: not every metric could be computed: it raised."
    assert headline(undecided(GOOD, FAILED)) == expected
    assert headline(undecided(UNSURE, FAILED)) == expected


def test_champion_and_recommended_do_not_contradict_each_other(decided: Summary) -> None:
    summary = decided(
        label="rank-4", reason="rank-4 has the lowest rank that does", gives_up=0.0312
    )
    assert headline(summary).startswith("Use rank-16: ")
    assert headline(summary).endswith(
        "than the gate allows; rank-4 is smaller and gives up at most 4\u00a0% of the gain."
    )
    assert (
        recommended_text(summary)
        == "Recommended where size counts: rank-4 has the lowest rank that does."
    )


def test_one_that_is_both_is_named_once(decided: Summary) -> None:
    summary = decided(label="rank-16", reason="rank-16 gains most", gives_up=None)
    assert headline(summary).endswith("it forgot no more than the gate allows.")
    assert recommended_text(summary) == "Recommended: rank-16 gains most."
