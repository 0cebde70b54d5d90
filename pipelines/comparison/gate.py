"""The gate: each rule is held against an end of an interval; one failure rejects, and what cannot be told does not pass.

    learnt enough                        a share of the control's task gain; without a control, surely more than nothing
    forgot little                        general abilities, against the base it was trained on
    forgot hardly more than the control  the same, less the control's own change
    forgot little of BENCHMARK           each benchmark of open questions by itself, against the base it was trained on
    is small enough to serve             its file, and its rank
    beats the registered champion        on the same items
    all metrics could be computed

A rule that does not apply is not listed: those that ask for a control without one, a limit that the recipe does not set,
a champion where none is registered or an adapter of the same comparison is that champion.

The score by which a task rates itself may have any scale, so the largest drop is there a share of the base's own mean
absolute score, which is taken as it was found: it is a measure, and not what is asked.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import floor, log10
from typing import Any, Literal

from pipelines.comparison.power import items_to_tell
from pipelines.comparison.resampling import Interval

Status = Literal["pass", "reject", "can't tell"]
HOPELESS = 100
"""As many times the items are not asked for; the two are too close to tell."""
NAMED_ERRORS = 3
SOMETHING = 1e-6
"""The least that is more than nothing: intervals have six digits."""


@dataclass(frozen=True)
class OpenChange:
    """How training changed one benchmark of open questions, which have no choices."""

    benchmark: str
    change: Interval
    """Of accuracy; of a benchmark that rates itself, of its score."""
    scale: float | None
    """The base's mean absolute score; None for accuracy."""
    items: int


@dataclass(frozen=True)
class Evidence:
    """What is known of one adapter."""

    control: str
    """How the control was trained: full, lora or none."""
    task_gain: Interval
    """Over the base in full precision, nats per token."""
    gain_share: Interval | None
    """Of the control's task gain; None where the control did not surely learn, or there is none."""
    general: Interval | None
    """Change of general abilities by training; None where none could be scored."""
    general_figure: str
    """What that change is of: choice_probability, or accuracy."""
    beyond_control: Interval | None
    """That change less the control's."""
    open_changes: tuple[OpenChange, ...]
    """Changes that the general one leaves out."""
    file_bytes: int
    rank: int
    over_champion: Interval | None
    """Task gain over the registered champion; None where there is none, or it is an adapter of the same comparison."""
    champion_objection: str | None
    """Why the registered champion cannot be compared; None where it can, or there is none."""
    errors: tuple[str, ...]
    """Metrics that could not be computed, each with its answer."""
    examples: int
    """Held-out examples behind the task's figures."""
    items: int
    """Items behind the general figures."""
    answers: int
    """Generated answers behind the metrics."""


@dataclass(frozen=True)
class Rule:
    """One rule, and how the adapter stands to it."""

    name: str
    status: Status
    reason: str
    beyond_items: bool = False
    """Whether it can't be told however many items are scored: something else is missing."""


@dataclass(frozen=True)
class Verdict:
    """The gate's decision on one adapter."""

    status: Status
    reason: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Question:
    """A rule that asks whether a figure reaches a bound."""

    name: str
    found: str
    """The figure in words, with a place for its value."""
    wanted: str
    """The rule in words, with a place for its bound."""
    sample: tuple[int, str]
    """How many there are of what the figure was measured on."""

    def hold(self, interval: Interval, bound: float) -> Rule:
        """Hold an interval against the bound: it passes from the bound up, is rejected below, and between cannot be told."""
        value = (
            f"{self.found.format(value=interval.mean)} ({interval.low:.3f} to {interval.high:.3f}"
        )
        wanted = self.wanted.format(bound=bound)
        if interval.low >= bound:
            return Rule(self.name, "pass", f"{value}; {wanted})")
        if interval.high < bound:
            return Rule(self.name, "reject", f"{value}), but the rule is {wanted}")
        more = _more(interval, bound, *self.sample)
        reason = f"{value}) spans the bound ({wanted}): {more or _too_close(*self.sample)}"
        return Rule(self.name, "can't tell", reason, beyond_items=more is None)


def decide(evidence: Evidence, gate: Mapping[str, Any]) -> Verdict:
    """Hold an adapter against every rule that applies.

    Args:
        evidence: what is known of the adapter.
        gate: the recipe's gate section as plain values.
    """
    forgetting = (
        *_forgetting(evidence, gate),
        *_forgetting_apart(evidence, gate["max_general_drop"]),
    )
    rules = (
        _learning(evidence, gate),
        *forgetting,
        *_serving(evidence, gate),
        *_beside(evidence, gate),
    )
    statuses = {rule.status for rule in rules}
    status: Status = (
        "reject" if "reject" in statuses else "pass" if statuses <= {"pass"} else "can't tell"
    )
    return Verdict(status, "; ".join(rule.reason for rule in rules if rule.status == status), rules)


def _learning(evidence: Evidence, gate: Mapping[str, Any]) -> Rule:
    sample = (evidence.examples, "held-out examples")
    if evidence.control == "none":
        question = Question(
            "surely learnt", "a task gain of {value:+.3f} over the base", "above 0", sample
        )
        return question.hold(evidence.task_gain, SOMETHING)
    if evidence.gain_share is None:
        reason = (
            "the control did not surely learn, so no share of it can be asked: give it more steps"
        )
        return Rule("learnt enough", "can't tell", reason, beyond_items=True)
    question = Question(
        "learnt enough", "{value:.0%} of the control's gain", "at least {bound:.0%}", sample
    )
    return question.hold(evidence.gain_share, gate["min_gain_share"])


def _forgetting(evidence: Evidence, gate: Mapping[str, Any]) -> Iterator[Rule]:
    wanted, sample = "no less than {bound:+.3f}", (evidence.items, "items")
    found = (
        "general change {value:+.3f}"
        if evidence.general_figure == "choice_probability"
        else "general change of accuracy {value:+.3f}"
    )
    if evidence.general is None:
        reason = "no question of general ability could be scored: ask some that fit the context"
        yield from (
            ()
            if evidence.open_changes
            else [Rule("forgot little", "can't tell", reason, beyond_items=True)]
        )
        return
    yield Question("forgot little", found, wanted, sample).hold(
        evidence.general, -gate["max_general_drop"]
    )
    if evidence.beyond_control is not None:
        question = Question(
            "forgot hardly more than the control",
            "{value:+.3f} against the control",
            wanted,
            sample,
        )
        yield question.hold(evidence.beyond_control, -gate["max_drop_beyond_control"])


def _forgetting_apart(evidence: Evidence, drop: float) -> Iterator[Rule]:
    """Hold each benchmark of open questions: a drop is of accuracy, or a share of the base's own score."""
    for one in evidence.open_changes:
        figure, scale = ("accuracy", 1.0) if one.scale is None else ("score", one.scale)
        found = f"change of {figure} on {_literal(one.benchmark)} {{value:+.3f}}"
        wanted = "no less than {bound:+.3f}" + (
            "" if one.scale is None else f", {100 * drop:g}% of the base's {scale:.3f}"
        )
        question = Question(
            f"forgot little of {one.benchmark}",
            found,
            wanted,
            (one.items, f"items of {one.benchmark}"),
        )
        yield question.hold(one.change, -drop * scale)


def _serving(evidence: Evidence, gate: Mapping[str, Any]) -> Iterator[Rule]:
    largest, highest = gate["max_file_mb"], gate["max_rank"]
    if largest is not None:
        yield _limit(
            "the file is small enough",
            f"a file of {evidence.file_bytes / 1e6:.3g} MB",
            evidence.file_bytes / 1e6,
            largest,
            " MB",
        )
    if highest is not None:
        yield _limit("the rank can be served", f"rank {evidence.rank}", evidence.rank, highest, "")


def _beside(evidence: Evidence, gate: Mapping[str, Any]) -> Iterator[Rule]:
    margin = gate["min_gain_over_champion"]
    if evidence.champion_objection is not None and margin is not None:
        way_out = "set gate.min_gain_over_champion to null to do without"
        reason = (
            f"the registered champion cannot be compared: {evidence.champion_objection}; {way_out}"
        )
        yield Rule("beats the champion", "can't tell", reason, beyond_items=True)
    elif evidence.over_champion is not None and margin is not None:
        sample = (evidence.examples, "held-out examples")
        question = Question(
            "beats the champion",
            "{value:+.3f} over the registered champion",
            "at least {bound:+.3f}",
            sample,
        )
        yield question.hold(evidence.over_champion, margin)
    if evidence.errors:
        named, more = "; ".join(evidence.errors[:NAMED_ERRORS]), len(evidence.errors) - NAMED_ERRORS
        reason = f"not every metric could be computed: {named}" + (
            f"; and {more} more" if more > 0 else ""
        )
        yield Rule("all metrics could be computed", "can't tell", reason, beyond_items=True)
    elif evidence.answers:
        yield Rule(
            "all metrics could be computed",
            "pass",
            f"every metric of {evidence.answers} answers could be computed",
        )


def _limit(name: str, found: str, value: float, limit: float, unit: str) -> Rule:
    if value <= limit:
        return Rule(name, "pass", f"{found} (at most {limit:g}{unit})")
    return Rule(name, "reject", f"{found}, but the rule is at most {limit:g}{unit}")


def _more(interval: Interval, bound: float, number: int, unit: str) -> str | None:
    """Say how many items would tell; None where no sensible number would."""
    needed = items_to_tell(interval, bound, number)
    if needed is None or needed > HOPELESS * number:
        return None
    return f"with about {_rounded(needed):,} {unit} (now {number:,}) it could be told"


def _too_close(number: int, unit: str) -> str:
    return f"so close that even {HOPELESS} times the {number:,} {unit} would not tell; set another bound, or judge it yourself"


def _literal(name: str) -> str:
    """Return a name as it stands in a text with places."""
    return name.replace("{", "{{").replace("}", "}}")


def _rounded(number: int) -> int:
    """Round up to two digits."""
    unit = 10 ** max(0, floor(log10(number)) - 1) if number > 0 else 1
    return -(-number // unit) * unit
