"""A criterion compares an interval with a bound; the result is pass, reject or undecided."""

from dataclasses import dataclass
from math import floor, log10
from typing import Literal

from pipelines.comparison.power import items_to_decide
from pipelines.comparison.resampling import Interval

Status = Literal["pass", "reject", "can't tell"]
MAX_ITEMS_FACTOR = 100
"""A decision that needs more than this multiple of the items counts as impossible."""


@dataclass(frozen=True)
class RuleResult:
    """The result of one rule for one adapter."""

    name: str
    status: Status
    reason: str
    beyond_items: bool = False
    """Whether no number of items would decide it: something else is missing."""


@dataclass(frozen=True)
class Criterion:
    """A rule that requires a metric to reach a bound."""

    name: str
    measured: str
    """Describes the metric; a format string with a field `value`."""
    required: str
    """Describes the rule; a format string with a field `bound`."""
    count: int
    """Number of items on which the metric was measured."""
    unit: str
    """What these items are."""

    def evaluate(self, interval: Interval, bound: float) -> RuleResult:
        """Compare an interval with the bound.

        Pass if all of it reaches the bound, reject if all of it is below, else "can't tell".

        Args:
            interval: of the metric, in its own unit.
            bound: in the same unit; the smallest value that passes.
        """
        required = self.required.format(bound=bound)
        mean = self.measured.format(value=interval.mean)
        ends = f"{interval.low:.3f} to {interval.high:.3f}"
        if interval.low >= bound:
            return RuleResult(self.name, "pass", f"{mean} ({ends}; {required})")
        if interval.high < bound:
            reason = f"{mean} ({ends}), but it must be {required}"
            return RuleResult(self.name, "reject", reason)
        needed = self._items_needed(interval, bound)
        reason = f"{mean} ({ends}) contains the bound ({required}): {self._outlook(needed)}"
        return RuleResult(self.name, "can't tell", reason, beyond_items=needed is None)

    def _items_needed(self, interval: Interval, bound: float) -> int | None:
        """Return how many items would decide; None if no reasonable number would."""
        needed = items_to_decide(interval, bound, self.count)
        if needed is None or needed > MAX_ITEMS_FACTOR * self.count:
            return None
        return needed

    def _outlook(self, needed: int | None) -> str:
        if needed is None:
            return (
                f"so close that even {MAX_ITEMS_FACTOR} times the {self.count:,} {self.unit} "
                "would not decide; set another bound, or decide yourself"
            )
        return f"about {_round_up(needed):,} {self.unit} (now {self.count:,}) would decide"


def check_limit(name: str, value: float, limit: float, *, measured: str, unit: str) -> RuleResult:
    """Check a value without uncertainty against an upper limit.

    Args:
        name: of the rule.
        value: in `unit`.
        limit: the largest value that passes.
        measured: describes the value in the reason.
        unit: follows the limit in the reason; starts with a blank unless it is a percent sign or
            empty.
    """
    if value <= limit:
        return RuleResult(name, "pass", f"{measured} (at most {limit:g}{unit})")
    return RuleResult(name, "reject", f"{measured}, but it must be at most {limit:g}{unit}")


def escape_braces(name: str) -> str:
    """Return a name as literal text of a format string."""
    return name.replace("{", "{{").replace("}", "}}")


def _round_up(number: int) -> int:
    """Round up to two significant digits."""
    if number <= 0:
        return number
    digits = max(0, floor(log10(number)) - 1)
    unit: int = 10**digits
    return -(-number // unit) * unit
