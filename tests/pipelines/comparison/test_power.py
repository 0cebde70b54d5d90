"""As many items as power asks for do show the drop in four samples of five, and the two formulas agree."""

import numpy as np
import pytest

from pipelines.comparison.power import items_to_tell, power_of
from pipelines.comparison.resampling import Interval, mean_interval

SETS = 400
CHANCE = 4 * np.sqrt(0.8 * 0.2 / SETS)
"""Four standard errors of a share of 400 samples."""


def test_the_items_that_are_asked_for_show_the_drop_in_four_of_five_samples() -> None:
    rng, drop, spread = np.random.default_rng(1), 0.05, 0.15
    pilot = np.array([-1.0, 1.0] * 50) * spread * np.sqrt(99 / 100)  # of exactly that spread
    needed = power_of([pilot], drop).needed
    assert needed == 73
    shown = [mean_interval(rng.normal(-drop, spread, needed)).high < 0 for _ in range(SETS)]
    assert np.mean(shown) == pytest.approx(0.8, abs=CHANCE)


def test_benchmarks_that_weigh_the_same_share_the_items() -> None:
    """Two benchmarks of unlike spread, and as many times more items of each as are asked for."""
    rng, drop, spreads = np.random.default_rng(2), 0.05, (0.05, 0.25)
    pilots = [np.array([-1.0, 1.0] * 20) * spread * np.sqrt(39 / 40) for spread in spreads]
    power = power_of(pilots, drop)
    assert power.items == 80
    assert power.needed is not None
    each = round(power.needed / 2)
    shown = [
        mean_interval(*(rng.normal(-drop, spread, each) for spread in spreads)).high < 0
        for _ in range(SETS)
    ]
    assert np.mean(shown) == pytest.approx(0.8, abs=CHANCE)


def test_the_smallest_drop_needs_as_many_items_as_there_are() -> None:
    samples = [
        np.random.default_rng(3).normal(0, 0.1, 40),
        np.random.default_rng(4).normal(0, 0.3, 60),
    ]
    smallest = power_of(samples, 0.03).smallest_drop
    assert power_of(samples, smallest).needed == pytest.approx(100, abs=1)
    assert power_of(samples, smallest / 2).needed == pytest.approx(4 * (100 - 1.92) + 1.92, abs=2)


def test_few_items_show_their_smallest_drop_in_four_of_five_samples() -> None:
    """Seven items ask for t, 2.45 standard errors where z has 1.96: a drop of 1.96 + 0.84 they show in 65 % of samples."""
    rng, spread = np.random.default_rng(6), 0.15
    pilot = np.array([-1.0, -1.0, -1.0, 0.0, 1.0, 1.0, 1.0]) * spread  # of exactly that spread
    power = power_of([pilot], 0.2)
    shown = [
        mean_interval(rng.normal(-power.smallest_drop, spread, 7)).high < 0 for _ in range(SETS)
    ]
    assert np.mean(shown) == pytest.approx(0.8, abs=CHANCE)


@pytest.mark.parametrize(("drop", "enough"), [(0.2, True), (0.1, False), (0.0, None)])
def test_power_says_whether_the_items_are_enough(drop: float, enough: bool | None) -> None:
    pilot = np.array([-1.0, -1.0, -1.0, 0.0, 1.0, 1.0, 1.0]) * 0.15
    assert power_of([pilot], drop).enough is enough


def test_no_number_of_items_shows_that_nothing_was_lost() -> None:
    assert power_of([np.array([0.1, -0.1, 0.2])], 0.0).needed is None


def test_where_all_items_agree_the_smallest_drop_is_nothing() -> None:
    assert power_of([np.full(5, 0.25)], 0.03).smallest_drop == 0


def test_the_items_that_would_tell_put_the_bound_outside_the_interval_in_four_of_five_samples() -> (
    None
):
    rng, mean, spread, bound = np.random.default_rng(5), -0.01, 0.08, -0.03
    error = 2.009575 * spread / np.sqrt(50)  # t of 49 degrees of freedom
    needed = items_to_tell(Interval(mean, mean - error, mean + error), bound, 50)
    assert needed == 128
    told = [mean_interval(rng.normal(mean, spread, needed)).low >= bound for _ in range(SETS)]
    assert np.mean(told) == pytest.approx(0.8, abs=CHANCE)


@pytest.mark.parametrize("side", [-1, 1])
def test_a_bound_is_as_hard_to_tell_from_either_side(side: int) -> None:
    """By hand: 100 · (0.1 · 2.8016 / 1.9842 / 0.05)² + 1.92 = 799.4."""
    assert items_to_tell(Interval(0.0, -0.1, 0.1), side * 0.05, 100) == 800


def test_nothing_tells_a_mean_from_a_bound_that_is_the_same() -> None:
    assert items_to_tell(Interval(-0.03, -0.05, -0.01), -0.03, 180) is None


def test_telling_takes_more_items_than_could_not_tell() -> None:
    """A bound at the very end of an interval would be outside it in half of the next samples; for four in five it takes twice."""
    assert items_to_tell(Interval(0.0, -0.1, 0.1), 0.1, 100) == pytest.approx(
        100 * (2.8016 / 1.9842) ** 2 + 1.92, abs=1
    )
