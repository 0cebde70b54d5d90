"""Statistical power: how many items a decision needs, and which drop the scored items can detect.

The standard error of a mean of n paired differences is σ/√n, with σ² over n − 1 as in the
intervals. A 95 % interval that ends below 0 detects a drop δ in 80 % of samples of

    n = ((z₀.₉₇₅ + z₀.₈) σ / δ)² + z₀.₉₇₅² / 2

items, and n items detect a drop of (t₀.₉₇₅ + z₀.₈) σ / √n (Miller 2024, arXiv 2411.00640, section
5; Cohen 1988, Statistical Power Analysis for the Behavioral Sciences). The last term corrects for z
in place of the interval's t, which would require n to be known (Guenther 1981, Sample Size Formulas
for Normal Theory T Tests). If B benchmarks have equal weight, σ²/n is Σ σ_b²/n_b / B², and more
items means proportionally more of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

from scipy.stats import t

from pipelines.comparison.resampling import (
    UPPER_QUANTILE,
    Array,
    Interval,
    squared_errors,
    t_quantile,
)

POWER = 0.8
Z_LEVEL = NormalDist().inv_cdf(UPPER_QUANTILE)
Z_POWER = NormalDist().inv_cdf(POWER)


@dataclass(frozen=True)
class Power:
    """What a sample can detect, over all benchmarks of general abilities or on one of them."""

    items: int
    """Items that were scored."""
    needed: int | None
    """Items that detect the largest drop the gate allows; None if it allows no drop at all."""
    smallest_drop: float
    """Drop that the scored items can detect."""
    enough: bool | None
    """Whether at least the needed items were scored; None if no number is enough."""


def power_of(samples: Sequence[Array], drop: float) -> Power:
    """Return what a sample can detect.

    Args:
        samples: for each benchmark the paired differences of its items, two or more.
        drop: the drop to detect.
    """
    items = sum(len(values) for values in samples)
    rows = [values[None] for values in samples]
    error = sqrt(squared_errors(rows).sum()) / len(samples)
    quantile = float(t_quantile(rows)[0])
    smallest_drop = round((quantile + Z_POWER) * error, 6)
    needed = None
    enough = None
    if drop > 0:
        needed = _items_needed(items * (error / drop) ** 2)
        enough = items >= needed
    return Power(items, needed, smallest_drop, enough)


def items_to_decide(interval: Interval, bound: float, items: int) -> int | None:
    """Return how many items exclude a bound from the interval in 80 % of samples.

    The mean is taken as the true one.

    Args:
        interval: of the scored items; it contains the bound.
        bound: what the metric is compared with.
        items: number of scored items.

    Returns:
        None if the mean equals the bound.
    """
    distance = abs(interval.mean - bound)
    quantile = float(t.ppf(UPPER_QUANTILE, max(1, items - 1)))
    error = (interval.high - interval.low) / (2 * quantile)
    if distance > 0:
        return _items_needed(items * (error / distance) ** 2)
    return None


def _items_needed(ratio: float) -> int:
    """Return the items needed, from (standard deviation of one item / effect)²."""
    return ceil((Z_LEVEL + Z_POWER) ** 2 * ratio + Z_LEVEL**2 / 2)
