"""How figures are written, everywhere: three digits, a sign on differences, units that do not break from their number."""

from collections.abc import Mapping, Sequence
from functools import partial

LARGE = 1e5
"""From here on a figure is written by its power of ten: a metric of one's own may have any scale."""


def signed(value: float) -> str:
    """Return a difference with its sign; what rounds to zero has none."""
    text = f"{value:+.3f}" if abs(value) < LARGE else f"{value:+.4g}"
    return text.replace("-", "−") if float(text) else text[1:]


def number(value: float, digits: int = 3) -> str:
    """Return a figure to so many decimals."""
    text = f"{value:.{digits}f}" if abs(value) < LARGE else f"{value:.4g}"
    return text.replace("-", "−")


def ends(interval: Mapping[str, float]) -> str:
    """Return the two ends of an interval."""
    return f"{signed(interval['low'])}, {signed(interval['high'])}"


def interval_text(interval: Mapping[str, float]) -> str:
    """Return a mean with the ends of its interval."""
    return f"{signed(interval['mean'])} ({ends(interval)})"


def is_clear(interval: Mapping[str, float]) -> bool:
    """Tell whether an interval leaves zero out."""
    return interval["low"] > 0 or interval["high"] < 0


def scaled(value: float, units: Sequence[str]) -> str:
    """Return three digits and the unit that makes them so, with a space that does not break: 19.7 MB."""
    place = 0
    while value >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    digits = f"{value:.0f}" if place == 0 else f"{value:#.3g}".rstrip(".")
    return f"{digits}\u00a0{units[place]}".rstrip()


short_count = partial(scaled, units=("", "k", "M", "G", "T"))
short_size = partial(scaled, units=("B", "kB", "MB", "GB", "TB"))


def duration(seconds: float) -> str:
    """Return seconds as minutes and seconds: 12 min 40 s."""
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 60 else f"{whole // 60} min {whole % 60:02d} s"


def p_value(value: float) -> str:
    """Return a p-value to two digits, and no smaller than so many rearrangements can tell."""
    return "p\u00a0<\u00a00.001" if value < 0.001 else f"p\u00a0{value:.2g}"


def rate(value: float) -> str:
    """Return a learning rate as one writes it: 0.0001, 5e-05."""
    return f"{value:g}"
