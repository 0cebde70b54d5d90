"""The resamples give scipy's intervals and p-values, and intervals have their nominal coverage."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import bootstrap, permutation_test, t, ttest_ind

from pipelines.comparison.resampling import (
    RESAMPLES,
    Array,
    Interval,
    mean_interval,
    mean_intervals,
    ratio_interval,
    resample_counts,
    sign_flip_p_value,
    sign_flips,
    stretch_factors,
)

SAMPLES = 1000
TOLERANCE = 0.2
"""In standard errors of the mean. The end of an interval from 4999 resamples has a standard error
of 0.04: √(0.025·0.975/4999) divided by the normal density at the end, 0.058. Two independent ends
differ by more than 0.2 only once in 3000 times."""


def standard_error(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def percentiles(interval: Interval, *samples: Array) -> tuple[float, float]:
    """Return the ends of an interval before they were stretched."""
    stretch = stretch_factors([values[None] for values in samples])[0]
    low = interval.mean + (interval.low - interval.mean) / stretch
    high = interval.mean + (interval.high - interval.mean) / stretch
    return low, high


def coverage(samples: list[Array], truth: float) -> float:
    """Return the fraction of intervals, one for each row, that contain the truth."""
    intervals = mean_intervals(samples)
    return float(np.mean([one.low <= truth <= one.high for one in intervals]))


def normal(rng: np.random.Generator, items: int) -> Array:
    return rng.normal(4.0, 1.0, (SAMPLES, items))


def skewed(rng: np.random.Generator, items: int) -> Array:
    """Draw from a gamma distribution of mean 4 and skewness 1."""
    return rng.gamma(4.0, 1.0, (SAMPLES, items))


@pytest.mark.parametrize("items", [2, 12, 13, 48, 600])
def test_every_resample_draws_the_number_of_items(items: int) -> None:
    counts = resample_counts(items, 0)
    assert counts.shape == (RESAMPLES, items)
    assert (counts.sum(axis=1) == items).all()
    assert counts.min() >= 0


def test_counts_have_the_binomial_distribution() -> None:
    """A count has mean 1 and variance 1 − 1/n; over 4999 its mean has a standard error of 0.014."""
    counts = resample_counts(40, 3).astype(float)
    assert counts.mean(axis=0) == pytest.approx(np.ones(40), abs=5 * 0.014)
    assert counts.var() == pytest.approx(1 - 1 / 40, abs=0.02)


def test_benchmarks_of_the_same_size_are_resampled_independently() -> None:
    first = resample_counts(30, 0).ravel().astype(float)
    second = resample_counts(30, 1).ravel().astype(float)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert (resample_counts(30, 0) == resample_counts(30, 0)).all()


def test_the_interval_of_a_mean_equals_scipys() -> None:
    values = np.random.default_rng(3).gamma(1.0, size=50)
    ours = mean_interval(values)
    theirs = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean(), abs=1e-6)
    tolerance = TOLERANCE * standard_error(values)
    assert percentiles(ours, values) == pytest.approx((theirs.low, theirs.high), abs=tolerance)


def test_the_interval_over_benchmarks_equals_scipys() -> None:
    rng = np.random.default_rng(5)
    samples = [rng.normal(0.0, 1.0, 30), rng.normal(1.0, 3.0, 30), rng.normal(-1.0, 0.5, 80)]

    def mean_of_means(*parts: Array, axis: int = -1) -> Array:
        return np.mean([part.mean(axis=axis) for part in parts], axis=0)

    ours = mean_interval(*samples)
    theirs = bootstrap(
        samples, mean_of_means, n_resamples=RESAMPLES, method="percentile", rng=rng
    ).confidence_interval
    assert ours.mean == pytest.approx(np.mean([values.mean() for values in samples]), abs=1e-6)
    error = np.sqrt(sum(standard_error(values) ** 2 for values in samples)) / 3
    expected = (theirs.low, theirs.high)
    assert percentiles(ours, *samples) == pytest.approx(expected, abs=TOLERANCE * error)


def test_the_interval_of_a_ratio_equals_scipys() -> None:
    rng = np.random.default_rng(6)
    denominator = rng.uniform(1, 9, 60)
    numerator = denominator * rng.normal(0.5, 0.2, 60)

    def ratio(first: Array, second: Array, axis: int = -1) -> Array:
        return first.sum(axis=axis) / second.sum(axis=axis)

    ours = ratio_interval(numerator, denominator)
    result = bootstrap(
        (numerator, denominator),
        ratio,
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=rng,
    )
    theirs = result.confidence_interval
    assert ours.mean == pytest.approx(numerator.sum() / denominator.sum(), abs=1e-6)
    tolerance = TOLERANCE * float(result.standard_error)
    expected = (theirs.low, theirs.high)
    assert percentiles(ours, numerator, denominator) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("items", [2, 5, 12, 30])
def test_an_interval_is_stretched_to_students(items: int) -> None:
    values = np.random.default_rng(items).normal(size=items)
    by_hand = t.ppf(0.975, items - 1) / 1.959964 * np.sqrt(items / (items - 1))
    assert stretch_factors([values[None]]) == pytest.approx([by_hand], rel=1e-6)


def test_the_stretch_over_benchmarks_is_welchs() -> None:
    """scipy's test of two samples has the same degrees of freedom, although for a difference."""
    rng = np.random.default_rng(11)
    first = rng.normal(0, 1.0, 6)
    second = rng.normal(0, 4.0, 15)
    freedom = ttest_ind(first, second, equal_var=False).df
    unbiased = first.var(ddof=1) / 6 + second.var(ddof=1) / 15
    biased = first.var(ddof=0) / 6 + second.var(ddof=0) / 15
    by_hand = t.ppf(0.975, freedom) / 1.959964 * np.sqrt(unbiased / biased)
    factors = stretch_factors([first[None], second[None]])
    assert factors == pytest.approx([by_hand], rel=1e-6)


@pytest.mark.parametrize("draw", [normal, skewed])
@pytest.mark.parametrize("sizes", [[5], [12], [30], [10] * 6], ids=str)
def test_intervals_of_few_items_have_nearly_their_nominal_coverage(
    draw: Callable[..., Array], sizes: list[int]
) -> None:
    """Percentiles alone cover 84, 92, 95 and 93 % of normal samples.

    The standard error of a fraction of 1000 is 0.7 %.
    """
    rng = np.random.default_rng(12)
    assert 0.92 <= coverage([draw(rng, items) for items in sizes], 4.0) <= 0.97


def test_metrics_have_the_same_intervals_together_and_alone() -> None:
    rng = np.random.default_rng(7)
    first = rng.normal(size=(3, 20))
    second = rng.normal(size=(3, 35))
    alone = [mean_interval(a, b) for a, b in zip(first, second, strict=True)]
    assert mean_intervals([first, second]) == alone


@pytest.mark.parametrize("values", [[0.3] * 9, [0.0] * 5])
def test_constant_items_have_an_interval_of_width_zero(values: list[float]) -> None:
    interval = mean_interval(np.array(values))
    assert (interval.mean, interval.low, interval.high) == (values[0],) * 3


def test_the_interval_of_a_mean_of_means_has_its_nominal_coverage() -> None:
    """200 samples of two benchmarks of 40 items: 95 % of intervals should contain the truth."""
    rng = np.random.default_rng(8)
    truth = -0.05
    covered = 0
    for _ in range(200):
        samples = [truth + shift + rng.uniform(-0.3, 0.3, 40) for shift in (-0.1, 0.1)]
        interval = mean_interval(*samples)
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_interval_of_a_ratio_has_its_nominal_coverage() -> None:
    rng = np.random.default_rng(9)
    truth = 0.7
    covered = 0
    for _ in range(200):
        gains = rng.uniform(0.2, 1.8, 40)
        interval = ratio_interval(truth * gains + rng.normal(0, 0.3, 40), gains)
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_a_p_value_of_few_items_tries_every_swap() -> None:
    """By hand: of the 2³ swaps of before and after, only ±(0.5 + 0.2 + 0.1) is as far from 0."""
    assert sign_flip_p_value(np.array([0.5, 0.2, 0.1])) == pytest.approx(2 / 8)
    assert sign_flip_p_value(np.array([0.5, 0.2, -0.1])) == pytest.approx(4 / 8)


@given(arrays(np.float64, st.integers(2, 9), elements=st.floats(-1, 1, width=16)))
def test_a_p_value_of_few_items_equals_an_enumeration(values: Array) -> None:
    flips = product((-1, 1), repeat=len(values))
    sums = np.array([abs(np.dot(signs, values)) for signs in flips])
    expected = np.mean(sums >= abs(values.sum()) - 1e-12)
    assert sign_flip_p_value(values) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("items", "shift"), [(8, 0.5), (12, 0.3), (40, 0.2), (200, 0.1), (200, 0.0)]
)
def test_a_p_value_equals_scipys(items: int, shift: float) -> None:
    """Exact for few items; for more, samples of 4999 swaps differ by up to 5 standard errors."""
    values = np.random.default_rng(items).normal(shift, 1.0, items)
    theirs = permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(1),
    ).pvalue
    tolerance = 1e-12
    if items > 12:
        tolerance = 5 * np.sqrt(2 * theirs * (1 - theirs) / RESAMPLES)
    assert sign_flip_p_value(values) == pytest.approx(theirs, abs=tolerance)


def test_p_values_without_an_effect_are_uniform() -> None:
    """400 samples without an effect: 5 % are below 0.05, with a standard error of 1.1 %."""
    rng = np.random.default_rng(10)
    p_values = np.array([sign_flip_p_value(rng.normal(0, 1, 30)) for _ in range(400)])
    assert np.mean(p_values < 0.05) == pytest.approx(0.05, abs=0.035)


def test_sampled_swaps_never_give_a_p_value_of_zero() -> None:
    """The observed signs count as one arrangement; no sampled one is as far from 0."""
    assert sign_flip_p_value(np.ones(50)) == 1 / (RESAMPLES + 1)


def test_the_p_value_is_one_if_nothing_changed() -> None:
    assert sign_flip_p_value(np.zeros(5)) == 1
    assert sign_flip_p_value(np.zeros(50)) == 1


def test_all_sign_flips_are_tried_for_few_items() -> None:
    assert len(np.unique(sign_flips(5), axis=0)) == 2**5
    assert sign_flips(13).shape == (RESAMPLES, 13)
    assert set(np.unique(sign_flips(13))) == {-1, 1}


@given(arrays(np.float64, st.integers(2, 30), elements=st.floats(-1, 1, width=32)))
def test_swapping_before_and_after_negates_an_interval(values: Array) -> None:
    forward = mean_interval(values)
    backward = mean_interval(-values)
    expected = (-forward.mean, -forward.high, -forward.low)
    assert (backward.mean, backward.low, backward.high) == pytest.approx(expected, abs=2e-6)
    assert sign_flip_p_value(values) == sign_flip_p_value(-values)
