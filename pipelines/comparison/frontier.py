"""Learning versus forgetting: a point for each scored model, and the adapter recommended from them.

The champion is the adapter with the largest gain. The recommended adapter has the lowest rank that
gives up little of that gain by its 95 % interval, since a rank that gains next to nothing costs
memory and time wherever it is served. "Not significantly lower" is not enough: with few examples
nothing is significant, and the lowest rank would always be recommended. An adapter that was
rank-truncated only for the frontier is mentioned if it is sufficient, but never recommended: it is
not registered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil

from pipelines.comparison.differences import displayed_change, task_gain
from pipelines.comparison.records import Records
from pipelines.comparison.resampling import Interval

MAX_GIVEN_UP = 0.1
"""Fraction of the best adapter's gain that a lower rank may give up, at the upper end of the
interval. It is a convention like the gate's bounds: small compared with the half that
`min_gain_share` lets an adapter lack, and large enough for a few dozen paired examples to confirm
it. Each halving of the rank halves the file."""


@dataclass(frozen=True)
class FrontierPoint:
    """Learning and forgetting of one model."""

    label: str
    method: str
    """full or lora."""
    rank: int | None
    step: int
    learning_rate: float
    cut_from: int | None
    """Rank of the adapter from which it was truncated."""
    trained: bool
    """Whether it is one of the compared models, not scored for the frontier only."""
    gain: Interval
    """Task gain over the full-precision base, nats per token."""
    general: Interval | None
    """Change of general abilities by training or, without these, of the tasks' own scores."""


@dataclass(frozen=True)
class FrontierVariant:
    """A model that only the frontier shows: an earlier step, another rate, or a truncated rank."""

    label: str
    """rank-R@STEP, control@STEP, rank-R lr RATE or rank-R→RANK."""
    method: str
    """full or lora."""
    rank: int | None
    """None for full fine-tuning."""
    step: int
    learning_rate: float
    cut_from: int | None = None
    """Rank of the adapter from which it was truncated."""


@dataclass(frozen=True)
class Recommendation:
    """The adapter to use, and why."""

    label: str
    reason: str
    gives_up: float | None = None
    """Most that it gives up, as a fraction of the best adapter's gain; None for the best itself."""


def frontier_point(
    variant: FrontierVariant,
    records: Records,
    *,
    full_precision_base: Records,
    training_base: Records,
    trained: bool,
) -> FrontierPoint:
    """Return a model's point on the frontier.

    Args:
        variant: how the model was trained.
        records: the model's item records.
        full_precision_base: item records of the base in full precision.
        training_base: item records of the base on which the model was trained.
        trained: whether it is one of the compared models.
    """
    return FrontierPoint(
        **asdict(variant),
        trained=trained,
        gain=task_gain(full_precision_base, records),
        general=displayed_change(training_base, records),
    )


def recommend(
    points: Sequence[FrontierPoint], passed: Sequence[str], items: Mapping[str, Records]
) -> Recommendation | None:
    """Return the lowest-rank adapter that gives up little of the best gain; None if none passes.

    Args:
        points: every model on the frontier.
        passed: labels of the adapters that pass the gate.
        items: label → item records, on which gains are compared item by item.
    """
    adapters = sorted((point for point in points if point.label in passed), key=_rank)
    if not adapters:
        return None
    best = max(adapters, key=lambda point: point.gain.mean)
    behind: dict[str, Interval] = {}
    for point in adapters:
        if _rank(point) == _rank(best):
            break
        interval = task_gain(items[point.label], items[best.label])
        if _gives_up_little(interval, best):
            reason = _lower_rank_reason(point, best, interval)
            reason += _truncation(point, best, points, items)
            given_up = _fraction_given_up(interval, best)
            return Recommendation(point.label, reason, round(given_up, 6))
        behind[point.label] = interval
    reason = _best_reason(best, behind, alone=len(adapters) == 1)
    reason += _truncation(best, best, points, items)
    return Recommendation(best.label, reason)


def _gives_up_little(behind: Interval, best: FrontierPoint) -> bool:
    return behind.high <= MAX_GIVEN_UP * best.gain.mean


def _fraction_given_up(behind: Interval, best: FrontierPoint) -> float:
    """Return the most that is given up, as a fraction of the best adapter's gain."""
    return max(0.0, behind.high) / best.gain.mean


def _lower_rank_reason(chosen: FrontierPoint, best: FrontierPoint, behind: Interval) -> str:
    most = percent(_fraction_given_up(behind, best))
    return (
        f"{chosen.label} has the lowest rank that gives up at most {MAX_GIVEN_UP:.0%} "
        f"of the task gain of {best.label} ({best.gain.mean:+.3f}) by its 95 % interval: "
        f"{_less(behind)} on the same items, at most {most}%"
    )


def _best_reason(best: FrontierPoint, behind: Mapping[str, Interval], *, alone: bool) -> str:
    if alone:
        return f"{best.label} is the only one that passes"
    if not behind:
        return (
            f"{best.label} gains most of those that pass ({best.gain.mean:+.3f}) "
            "and has the lowest rank of them"
        )
    lower = "; ".join(f"{label} {_less(interval)}" for label, interval in behind.items())
    return (
        f"{best.label} gains most ({best.gain.mean:+.3f}), and no lower rank that passes "
        f"gives up at most {MAX_GIVEN_UP:.0%} by its 95 % interval: {lower}"
    )


def percent(fraction: float) -> int:
    """Return a fraction in percent, rounded up to an integer."""
    return ceil(round(100 * fraction, 4))


def _truncation(
    chosen: FrontierPoint,
    best: FrontierPoint,
    points: Sequence[FrontierPoint],
    items: Mapping[str, Records],
) -> str:
    """Mention the lowest truncated rank below the chosen one that gives up little too, if any."""
    truncated = [point for point in points if point.cut_from is not None]
    for point in sorted(truncated, key=_rank):
        if _rank(point) >= _rank(chosen):
            break
        behind = task_gain(items[point.label], items[best.label])
        if _gives_up_little(behind, best):
            most = percent(_fraction_given_up(behind, best))
            general = ""
            if point.general is not None:
                general = f", with a general change of {point.general.mean:+.3f}"
            return (
                f"; rank {point.cut_from} truncated to {point.rank} would give up at most {most}% "
                f"({_less(behind)}){general}, but is not registered"
            )
    return ""


def _less(behind: Interval) -> str:
    return f"{behind.mean:.3f} less ({behind.low:.3f} to {behind.high:.3f})"


def _rank(point: FrontierPoint) -> int:
    assert point.rank is not None, "adapters and truncations have a rank"
    return point.rank
