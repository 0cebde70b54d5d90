"""The needed items detect a drop in 80 % of samples, and the two formulas agree."""

import numpy as np
import pytest

from pipelines.comparison.power import items_to_decide, power_of
from pipelines.comparison.resampling import Array, Interval, mean_interval

SAMPLES = 400
TOLERANCE = 4 * np.sqrt(0.8 * 0.2 / SAMPLES)
"""Four standard errors of a fraction of 400 samples."""
SEVEN_ITEMS = np.array([-1.0, -1.0, -1.0, 0.0, 1.0, 1.0, 1.0]) * 0.15
"""Their standard deviation is exactly 0.15."""


def pilot_of(items: int, spread: float) -> Array:
    """Return items of mean 0 whose standard deviation is exactly `spread`."""
    values = np.array([-1.0, 1.0] * (items // 2))
    return values * spread * np.sqrt((items - 1) / items)


def test_the_needed_items_detect_the_drop_in_80_percent_of_samples() -> None:
    rng = np.random.default_rng(1)
    drop, spread = 0.05, 0.15
    needed = power_of([pilot_of(100, spread)], drop).needed
    assert needed == 73
    detected = []
    for _ in range(SAMPLES):
        interval = mean_interval(rng.normal(-drop, spread, needed))
        detected.append(interval.high < 0)
    assert np.mean(detected) == pytest.approx(0.8, abs=TOLERANCE)


def test_the_needed_items_are_divided_over_benchmarks_of_equal_weight() -> None:
    """Two benchmarks of different spread; the needed items increase both in proportion."""
    rng = np.random.default_rng(2)
    drop = 0.05
    spreads = (0.05, 0.25)
    power = power_of([pilot_of(40, spread) for spread in spreads], drop)
    assert power.items == 80
    assert power.needed is not None
    each = round(power.needed / 2)
    detected = []
    for _ in range(SAMPLES):
        samples = [rng.normal(-drop, spread, each) for spread in spreads]
        detected.append(mean_interval(*samples).high < 0)
    assert np.mean(detected) == pytest.approx(0.8, abs=TOLERANCE)


def test_the_smallest_drop_needs_the_scored_items() -> None:
    samples = [
        np.random.default_rng(3).normal(0, 0.1, 40),
        np.random.default_rng(4).normal(0, 0.3, 60),
    ]
    smallest = power_of(samples, 0.03).smallest_drop
    assert power_of(samples, smallest).needed == pytest.approx(100, abs=1)
    assert power_of(samples, smallest / 2).needed == pytest.approx(4 * (100 - 1.92) + 1.92, abs=2)


def test_few_items_detect_their_smallest_drop_in_80_percent_of_samples() -> None:
    """Seven items need t: 2.45 standard errors where z has 1.96.

    They detect a drop of 1.96 + 0.84 standard errors in only 65 % of samples.
    """
    rng = np.random.default_rng(6)
    smallest = power_of([SEVEN_ITEMS], 0.2).smallest_drop
    detected = []
    for _ in range(SAMPLES):
        interval = mean_interval(rng.normal(-smallest, 0.15, 7))
        detected.append(interval.high < 0)
    assert np.mean(detected) == pytest.approx(0.8, abs=TOLERANCE)


@pytest.mark.parametrize(("drop", "enough"), [(0.2, True), (0.1, False), (0.0, None)])
def test_power_reports_whether_the_items_are_enough(drop: float, enough: bool | None) -> None:
    assert power_of([SEVEN_ITEMS], drop).enough is enough


def test_no_number_of_items_detects_a_drop_of_zero() -> None:
    assert power_of([np.array([0.1, -0.1, 0.2])], 0.0).needed is None


def test_the_smallest_drop_is_zero_if_all_items_agree() -> None:
    assert power_of([np.full(5, 0.25)], 0.03).smallest_drop == 0


def test_items_to_decide_exclude_the_bound_in_80_percent_of_samples() -> None:
    rng = np.random.default_rng(5)
    mean, spread, bound = -0.01, 0.08, -0.03
    error = 2.009575 * spread / np.sqrt(50)  # t with 49 degrees of freedom
    needed = items_to_decide(Interval(mean, mean - error, mean + error), bound, 50)
    assert needed == 128
    decided = []
    for _ in range(SAMPLES):
        interval = mean_interval(rng.normal(mean, spread, needed))
        decided.append(interval.low >= bound)
    assert np.mean(decided) == pytest.approx(0.8, abs=TOLERANCE)


@pytest.mark.parametrize("side", [-1, 1])
def test_items_to_decide_are_symmetric(side: int) -> None:
    """By hand: 100 · (0.1 · 2.8016 / 1.9842 / 0.05)² + 1.92 = 799.4."""
    assert items_to_decide(Interval(0.0, -0.1, 0.1), side * 0.05, 100) == 800


def test_no_number_of_items_decides_if_the_mean_equals_the_bound() -> None:
    assert items_to_decide(Interval(-0.03, -0.05, -0.01), -0.03, 180) is None


def test_a_bound_at_the_end_of_the_interval_needs_about_twice_the_items() -> None:
    """The same number of items would exclude it in only half of the samples."""
    expected = 100 * (2.8016 / 1.9842) ** 2 + 1.92
    assert items_to_decide(Interval(0.0, -0.1, 0.1), 0.1, 100) == pytest.approx(expected, abs=1)
