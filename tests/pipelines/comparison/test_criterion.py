"""A criterion passes at its bound, rejects below, and reports how many items would decide."""

import pytest

from pipelines.comparison.criterion import Criterion, check_limit
from pipelines.comparison.resampling import Interval

CRITERION = Criterion("rule", "change {value:+.3f}", "at least {bound:+.3f}", 180, "items")
BOUND = -0.03


@pytest.mark.parametrize(
    ("interval", "status"),
    [
        (Interval(-0.02, -0.029, 0.0), "pass"),
        (Interval(-0.03, -0.03, -0.03), "pass"),
        (Interval(-0.02, -0.031, 0.01), "can't tell"),
        (Interval(-0.05, -0.07, -0.03), "can't tell"),
        (Interval(-0.05, -0.07, -0.031), "reject"),
        (Interval(float("nan"), float("nan"), float("nan")), "can't tell"),
    ],
)
def test_an_end_of_the_interval_is_compared_with_the_bound(interval: Interval, status: str) -> None:
    assert CRITERION.evaluate(interval, BOUND).status == status


def test_a_pass_reports_interval_and_bound() -> None:
    result = CRITERION.evaluate(Interval(-0.02, -0.025, 0.0), BOUND)
    assert result.reason == "change -0.020 (-0.025 to 0.000; at least -0.030)"


def test_a_rejection_reports_interval_and_bound() -> None:
    result = CRITERION.evaluate(Interval(-0.06, -0.09, -0.04), BOUND)
    assert result.reason == "change -0.060 (-0.090 to -0.040), but it must be at least -0.030"


def test_an_undecided_result_reports_how_many_items_would_decide() -> None:
    """By hand: ±0.03 around −0.01, compared with −0.03.

    180 · (0.03 · 2.8016 / 1.9733 / 0.02)² + 1.92 = 818.4 items.
    """
    result = CRITERION.evaluate(Interval(-0.01, -0.04, 0.02), BOUND)
    assert result.reason == (
        "change -0.010 (-0.040 to 0.020) contains the bound (at least -0.030): "
        "about 820 items (now 180) would decide"
    )
    assert not result.beyond_items


def test_large_numbers_of_items_have_a_thousands_separator() -> None:
    result = CRITERION.evaluate(Interval(-0.025, -0.055, 0.005), BOUND)
    assert "about 14,000 items (now 180)" in result.reason


@pytest.mark.parametrize("mean", [-0.03, -0.0299])
def test_a_result_that_no_reasonable_sample_would_decide(mean: float) -> None:
    result = CRITERION.evaluate(Interval(mean, -0.06, 0.0), BOUND)
    assert result.reason.endswith(
        "so close that even 100 times the 180 items would not decide; "
        "set another bound, or decide yourself"
    )
    assert result.beyond_items


@pytest.mark.parametrize(("value", "status"), [(20.0, "pass"), (20.1, "reject")])
def test_a_limit_is_inclusive(value: float, status: str) -> None:
    result = check_limit("rule", value, 20, measured=f"{value} MB", unit=" MB")
    assert result.status == status
    assert result.reason.startswith(f"{value} MB")
    assert result.reason.rstrip(")").endswith("at most 20 MB")
