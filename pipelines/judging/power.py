"""How many items it takes to tell, and what those at hand can tell.

A mean of n paired differences strays by σ/√n. A drop δ is shown, by a 95 % interval that ends below 0, in 80 % of samples of

    n = ((z₀.₉₇₅ + z₀.₈) σ / δ)²

items, and n items show a drop of (z₀.₉₇₅ + z₀.₈) σ / √n (Miller 2024, arXiv 2411.00640, section 5; Cohen 1988, Statistical
Power Analysis for the Behavioral Sciences). Where B benchmarks weigh the same, σ²/n is Σ σ_b²/n_b / B², and more items
means as many times more of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

from pipelines.judging.resampling import LEVEL, Array, Interval

POWER = 0.8
Z_LEVEL, Z_POWER = NormalDist().inv_cdf((1 + LEVEL) / 2), NormalDist().inv_cdf(POWER)


@dataclass(frozen=True)
class Power:
    """What a sample can tell of general abilities."""

    items: int
    """Items that were scored."""
    needed: int | None
    """Items that show the largest drop the gate allows; None where it allows none, which no number of items shows."""
    smallest_drop: float
    """Drop that the scored items can show."""


def power_of(samples: Sequence[Array], drop: float) -> Power:
    """Return what a sample can tell.

    Args:
        samples: for each benchmark the paired differences of its items, two or more.
        drop: the drop to be shown.
    """
    items = sum(len(values) for values in samples)
    error = sqrt(sum(float(values.var(ddof=1)) / len(values) for values in samples)) / len(samples)
    smallest = (Z_LEVEL + Z_POWER) * error
    return Power(items, ceil(items * (smallest / drop) ** 2) if drop > 0 else None, round(smallest, 6))


def items_to_tell(interval: Interval, bound: float, items: int) -> int | None:
    """Return how many items would put a bound outside the interval in 80 % of samples, if the mean found is the true one.

    Args:
        interval: found from the items at hand; the bound lies inside it.
        bound: what the figure is held against.
        items: how many there are at hand.

    Returns:
        None where the mean is the bound itself.
    """
    distance, error = abs(interval.mean - bound), (interval.high - interval.low) / (2 * Z_LEVEL)
    return ceil(items * ((Z_LEVEL + Z_POWER) * error / distance) ** 2) if distance > 0 else None
