"""Number formats of every table and page: three digits, signed differences, non-breaking units."""

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:  # number formats are also used where scipy must not be imported
    from pipelines.comparison.differences import BenchmarkChange
    from pipelines.comparison.resampling import Interval

AnyInterval = Union["Interval", "BenchmarkChange"]
LARGE = 1e5
"""Values from here on are written with an exponent: a user-defined metric may have any scale."""


def signed(value: float) -> str:
    """Return a difference with its sign; a value that rounds to zero has none."""
    text = f"{value:+.3f}"
    if abs(value) >= LARGE:
        text = f"{value:+.4g}"
    if not float(text):
        return text[1:]
    return text.replace("-", "−")


def number(value: float, digits: int = 3) -> str:
    """Return a value with the given number of decimals.

    Args:
        value: in any unit.
        digits: after the decimal point.
    """
    text = f"{value:.{digits}f}"
    if abs(value) >= LARGE:
        text = f"{value:.4g}"
    return text.replace("-", "−")


def ends(interval: AnyInterval) -> str:
    """Return the two ends of an interval."""
    return f"{signed(interval.low)}, {signed(interval.high)}"


def minus_signs(text: str) -> str:
    """Return a sentence with minus signs instead of the hyphens before numbers."""
    return re.sub(r"(?<![\w.-])-(?=\d)", "−", text)


def interval_text(interval: AnyInterval) -> str:
    """Return a mean and the ends of its interval."""
    return f"{signed(interval.mean)} ({ends(interval)})"


def is_clear(interval: AnyInterval) -> bool:
    """Return whether an interval excludes zero."""
    return interval.low > 0 or interval.high < 0


def scaled(value: float, units: Sequence[str]) -> str:
    """Return three digits and the matching unit, joined by a non-breaking space: 19.7 MB.

    Args:
        value: not negative, in the first of the units.
        units: each a thousand times the one before it.
    """
    index = 0
    while value >= 999.5 and index < len(units) - 1:
        value /= 1000
        index += 1
    digits = f"{value:.0f}"
    if index > 0:
        digits = f"{value:#.3g}".rstrip(".")
    return f"{digits}\u00a0{units[index]}".rstrip()


short_count = partial(scaled, units=("", "k", "M", "G", "T"))
short_size = partial(scaled, units=("B", "kB", "MB", "GB", "TB"))


def duration(seconds: float) -> str:
    """Return a duration in at most two units: 0.47 s, 16.0 s, 12 min 40 s, 2 h 18 min, 3.1 days."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {rest:02d} min"
    return f"{seconds / 86_400:.3g} days"


def p_value(value: float) -> str:
    """Return a p-value with two digits; the resamples cannot resolve less than 0.001."""
    if value < 0.001:
        return "p\u00a0<\u00a00.001"
    return f"p\u00a0{value:.2g}"


def rate(value: float) -> str:
    """Return a learning rate in its shortest form: 0.0001, 5e-05."""
    return f"{value:g}"
