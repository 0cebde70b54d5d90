"""Learning against forgetting, a point for each model that was scored, and which adapter the points speak for.

Champion is the adapter that gains most; recommended is the one of the lowest rank whose gain is not surely lower, since
a rank that buys nothing costs memory and time wherever it is served. An adapter that was only cut for the picture is
named where it would do, and never put forward: it is not registered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pipelines.judging.differences import general_change, task_gain
from pipelines.judging.records import Records
from pipelines.judging.resampling import Interval


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
    """Change of general abilities by training."""


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


def place(variant: Variant, bases: tuple[Records, Records], records: Records, *, trained: bool) -> Point:
    """Place a model between learning and forgetting.

    Args:
        variant: what it is.
        bases: the base in full precision, and the one it was trained on.
        records: its own.
        trained: whether it is judged.
    """
    gain, general = task_gain(bases[0], records), general_change(bases[1], records)
    return Point(**asdict(variant), trained=trained, gain=gain, general=general)


def recommend(points: Sequence[Point], passed: Sequence[str], items: Mapping[str, Records]) -> Recommendation | None:
    """Return the adapter of the lowest rank whose gain is not surely lower than the best one's; None where none passes.

    Args:
        points: every model that was placed.
        passed: labels of the adapters that pass the gate.
        items: label → item records, on which gains are compared pair by pair.
    """
    adapters = sorted((one for one in points if one.label in passed), key=_rank)
    if not adapters:
        return None
    best = max(adapters, key=lambda one: one.gain.mean)
    behind = {one.label: task_gain(items[one.label], items[best.label]) for one in adapters if _rank(one) < _rank(best)}
    chosen = next((one for one in adapters if one.label in behind and behind[one.label].low <= 0), best)
    reason = _reason(chosen, best, behind, alone=len(adapters) == 1)
    return Recommendation(chosen.label, reason + _shorter(chosen, best, points, items))


def _reason(chosen: Point, best: Point, behind: Mapping[str, Interval], *, alone: bool) -> str:
    if alone:
        return f"{chosen.label} is the only one that passes"
    if chosen is not best:
        return (
            f"{chosen.label} has the lowest rank whose task gain ({chosen.gain.mean:+.3f}) is not surely lower than that of "
            f"{best.label} ({best.gain.mean:+.3f}): {_less(behind[chosen.label])} on the same items"
        )
    if not behind:
        return f"{chosen.label} gains most of those that pass ({chosen.gain.mean:+.3f}) and has the lowest rank of them"
    lower = "; ".join(f"{label} {_less(interval)}" for label, interval in behind.items())
    return f"{chosen.label} gains most ({chosen.gain.mean:+.3f}), and each lower rank that passes surely gains less: {lower}"


def _shorter(chosen: Point, best: Point, points: Sequence[Point], items: Mapping[str, Records]) -> str:
    """Name the shortest cut below the chosen rank that gains no less, if there is one."""
    cuts = sorted((one for one in points if one.cut_from is not None and _rank(one) < _rank(chosen)), key=_rank)
    for one in cuts:
        behind = task_gain(items[one.label], items[best.label])
        if behind.low <= 0:
            general = f", with a general change of {one.general.mean:+.3f}" if one.general is not None else ""
            return (
                f"; rank {one.cut_from} cut to {one.rank} is not surely behind it either ({_less(behind)}){general}, but is not registered"
            )
    return ""


def _less(behind: Interval) -> str:
    return f"{behind.mean:.3f} less ({behind.low:.3f} to {behind.high:.3f})"


def _rank(one: Point) -> int:
    assert one.rank is not None, "adapters and cuts have a rank"
    return one.rank
