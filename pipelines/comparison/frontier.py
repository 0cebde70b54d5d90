"""Learning against forgetting, a point for each model that was scored, and which adapter the points speak for.

Champion is the adapter that gains most; recommended is the one of the lowest rank that surely gives up little of that gain,
since a rank that buys next to nothing costs memory and time wherever it is served. That it is not surely lower would not
do: from few examples nothing is sure, and the lowest rank would always be recommended. An adapter that was only cut for the picture is
named where it would do, and never put forward: it is not registered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil

from pipelines.comparison.differences import pictured_change, task_gain
from pipelines.comparison.records import Records
from pipelines.comparison.resampling import Interval

LITTLE = 0.1
"""Share of the best one's gain that a lower rank may give up, at the upper end of the interval. It is a convention like the
gate's bounds: small beside the half that `min_gain_share` lets an adapter lack, and wide enough for some dozen paired examples
to show it; each halving of the rank halves the file."""


@dataclass(frozen=True)
class Point:
    """One model between learning and forgetting."""

    label: str
    method: str
    """full or lora."""
    rank: int | None
    step: int
    learning_rate: float
    cut_from: int | None
    """Rank of the adapter that it was cut from."""
    trained: bool
    """Whether it is one of the models that are judged, and not scored for the picture only."""
    gain: Interval
    """Task gain over the full-precision base, nats per token."""
    general: Interval | None
    """Change of general abilities by training, or of the scores by which tasks rate themselves where nothing else was asked."""


@dataclass(frozen=True)
class Variant:
    """A model that is scored for the picture: an earlier step, another learning rate, or a cut to a lower rank."""

    label: str
    """rank-R@STEP, control@STEP, rank-R lr RATE or rank-R→RANK."""
    method: str
    """full or lora."""
    rank: int | None
    """None for full fine-tuning."""
    step: int
    learning_rate: float
    cut_from: int | None = None
    """Rank of the adapter that it was cut from."""


@dataclass(frozen=True)
class Recommendation:
    """The adapter to use, and why."""

    label: str
    reason: str
    gives_up: float | None = None
    """The most that it gives up, as a share of the best one's gain; None for the best itself."""


def place(
    variant: Variant, bases: tuple[Records, Records], records: Records, *, trained: bool
) -> Point:
    """Place a model between learning and forgetting.

    Args:
        variant: what it is.
        bases: the base in full precision, and the one it was trained on.
        records: its own.
        trained: whether it is judged.
    """
    gain, general = task_gain(bases[0], records), pictured_change(bases[1], records)
    return Point(**asdict(variant), trained=trained, gain=gain, general=general)


def recommend(
    points: Sequence[Point], passed: Sequence[str], items: Mapping[str, Records]
) -> Recommendation | None:
    """Return the adapter of the lowest rank that surely gives up little of the best one's gain; None where none passes.

    Args:
        points: every model that was placed.
        passed: labels of the adapters that pass the gate.
        items: label → item records, on which gains are compared pair by pair.
    """
    adapters = sorted((one for one in points if one.label in passed), key=_rank)
    if not adapters:
        return None
    best = max(adapters, key=lambda one: one.gain.mean)
    behind = {
        one.label: task_gain(items[one.label], items[best.label])
        for one in adapters
        if _rank(one) < _rank(best)
    }
    chosen = next(
        (one for one in adapters if one.label in behind and _is_little(behind[one.label], best)),
        best,
    )
    reason = _reason(chosen, best, behind, alone=len(adapters) == 1)
    given_up = None if chosen is best else round(_share(behind[chosen.label], best), 6)
    return Recommendation(chosen.label, reason + _shorter(chosen, best, points, items), given_up)


def _is_little(behind: Interval, best: Point) -> bool:
    return behind.high <= LITTLE * best.gain.mean


def _share(behind: Interval, best: Point) -> float:
    """Return the most that is given up, as a share of the best one's gain."""
    return max(0.0, behind.high) / best.gain.mean


def _reason(chosen: Point, best: Point, behind: Mapping[str, Interval], *, alone: bool) -> str:
    if alone:
        return f"{chosen.label} is the only one that passes"
    if chosen is not best:
        most = percent(_share(behind[chosen.label], best))
        return (
            f"{chosen.label} has the lowest rank that surely gives up no more than {LITTLE:.0%} of the task gain of {best.label} "
            f"({best.gain.mean:+.3f}): {_less(behind[chosen.label])} on the same items, at most {most}%"
        )
    if not behind:
        return f"{chosen.label} gains most of those that pass ({chosen.gain.mean:+.3f}) and has the lowest rank of them"
    lower = "; ".join(f"{label} {_less(interval)}" for label, interval in behind.items())
    return f"{chosen.label} gains most ({chosen.gain.mean:+.3f}), and no lower rank that passes surely gives up at most {LITTLE:.0%}: {lower}"


def percent(share: float) -> int:
    """Return a share in whole percent, rounded up."""
    return ceil(round(100 * share, 4))


def _shorter(
    chosen: Point, best: Point, points: Sequence[Point], items: Mapping[str, Records]
) -> str:
    """Name the shortest cut below the chosen rank that surely gives up little too, if there is one."""
    cuts = sorted(
        (one for one in points if one.cut_from is not None and _rank(one) < _rank(chosen)),
        key=_rank,
    )
    for one in cuts:
        behind = task_gain(items[one.label], items[best.label])
        if _is_little(behind, best):
            general = (
                f", with a general change of {one.general.mean:+.3f}"
                if one.general is not None
                else ""
            )
            little = f"at most {percent(_share(behind, best))}% ({_less(behind)})"
            return f"; rank {one.cut_from} cut to {one.rank} would give up {little}{general}, but is not registered"
    return ""


def _less(behind: Interval) -> str:
    return f"{behind.mean:.3f} less ({behind.low:.3f} to {behind.high:.3f})"


def _rank(one: Point) -> int:
    assert one.rank is not None, "adapters and cuts have a rank"
    return one.rank
