"""How many items it takes to tell, and what those at hand can tell.

A mean of n paired differences strays by σ/√n, with σ² over n − 1 as in the intervals. A drop δ is shown, by a 95 % interval
that ends below 0, in 80 % of samples of

    n = ((z₀.₉₇₅ + z₀.₈) σ / δ)² + z₀.₉₇₅² / 2

items, and n items show a drop of (t₀.₉₇₅ + z₀.₈) σ / √n (Miller 2024, arXiv 2411.00640, section 5; Cohen 1988, Statistical
Power Analysis for the Behavioral Sciences). The last term makes up for z in place of the interval's t, which would need n to
be known (Guenther 1981, Sample Size Formulas for Normal Theory T Tests). Where B benchmarks weigh the same, σ²/n is
Σ σ_b²/n_b / B², and more items means as many times more of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

from scipy.stats import t

from pipelines.comparison.resampling import LEVEL, Array, Interval, squared_errors, t_quantile

POWER = 0.8
Z_LEVEL, Z_POWER = NormalDist().inv_cdf((1 + LEVEL) / 2), NormalDist().inv_cdf(POWER)


@dataclass(frozen=True)
class Power:
    """What a sample can tell of general abilities, or of one benchmark."""

    items: int
    """Items that were scored."""
    needed: int | None
    """Items that show the largest drop the gate allows; None where it allows none, which no number of items shows."""
    smallest_drop: float
    """Drop that the scored items can show."""
    enough: bool | None
    """Whether as many were scored as are needed; None where no number would do."""


def power_of(samples: Sequence[Array], drop: float) -> Power:
    """Return what a sample can tell.

    Args:
        samples: for each benchmark the paired differences of its items, two or more.
        drop: the drop to be shown.
    """
    items = sum(len(values) for values in samples)
    figures = [values[None] for values in samples]
    error = sqrt(squared_errors(figures).sum()) / len(samples)
    needed = _needed(items * (error / drop) ** 2) if drop > 0 else None
    smallest = (float(t_quantile(figures)[0]) + Z_POWER) * error
    return Power(items, needed, round(smallest, 6), None if needed is None else items >= needed)


def items_to_tell(interval: Interval, bound: float, items: int) -> int | None:
    """Return how many items would put a bound outside the interval in 80 % of samples, if the mean found is the true one.

    Args:
        interval: found from the items at hand; the bound lies inside it.
        bound: what the figure is held against.
        items: how many there are at hand.

    Returns:
        None where the mean is the bound itself.
    """
    quantile = float(t.ppf((1 + LEVEL) / 2, max(1, items - 1)))
    distance, error = abs(interval.mean - bound), (interval.high - interval.low) / (2 * quantile)
    return _needed(items * (error / distance) ** 2) if distance > 0 else None


def _needed(ratio: float) -> int:
    """Return the items needed, from the squared ratio of one item's standard deviation to what is to be told."""
    return ceil((Z_LEVEL + Z_POWER) ** 2 * ratio + Z_LEVEL**2 / 2)
