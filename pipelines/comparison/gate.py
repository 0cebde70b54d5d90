"""The gate: compare each rule with an end of an interval; one failure rejects, all must pass.

    learned enough                       a fraction of the control's task gain
    gained on the task                   without a control: a significant gain over the base
    forgot little                        general abilities, from the base on which it was trained
    forgot little more than the control  the same, minus the control's own change
    forgot little of BENCHMARK           one benchmark of open questions, from the same base
    the file is small enough             to serve
    the rank can be served               by the engine
    beats the champion                   on the same items
    all metrics could be computed        of the generated answers

A rule that does not apply is not listed: comparisons with the control if there is none, a limit
that the recipe does not set, the champion if none is registered or an adapter of the same
comparison is that champion.

A task's own score may have any scale, so its largest drop is a fraction of the base's mean absolute
score. That scale is taken as a constant, without an interval.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.comparison.criterion import (
    Criterion,
    RuleResult,
    Status,
    check_limit,
    escape_braces,
)
from pipelines.comparison.resampling import Interval
from pipelines.config.sections import GateSection

NAMED_ERRORS = 3
MIN_POSITIVE = 1e-6
"""Smallest value above 0: intervals have six decimals."""


@dataclass(frozen=True)
class OpenChange:
    """Change by training on one benchmark of open questions, which have no choices."""

    benchmark: str
    change: Interval
    """Of accuracy; of the task's own score if it has one."""
    scale: float | None
    """The base's mean absolute score; None for accuracy."""
    items: int


@dataclass(frozen=True)
class Evidence:
    """The measurements of one adapter."""

    control: str
    """How the control was trained: full, lora or none."""
    task_gain: Interval
    """Over the base in full precision, nats per token."""
    gain_share: Interval | None
    """Fraction of the control's task gain; None if that is not significant, or there is no
    control."""
    general: Interval | None
    """Change of general abilities by training; None if none could be scored."""
    general_metric: str
    """What that change is of: choice_probability, or accuracy."""
    beyond_control: Interval | None
    """That change minus the control's."""
    open_changes: tuple[OpenChange, ...]
    """Changes that `general` does not include."""
    file_bytes: int
    rank: int
    over_champion: Interval | None
    """Task gain over the registered champion; None if there is none, or it is an adapter of the
    same comparison."""
    champion_objection: str | None
    """Why the registered champion cannot be compared; None if it can, or there is none."""
    errors: tuple[str, ...]
    """Metrics that could not be computed, each with its answer."""
    examples: int
    """Held-out examples on which the task metrics were measured."""
    items: int
    """Items on which general abilities were measured."""
    answers: int
    """Generated answers on which the metrics were measured."""


@dataclass(frozen=True)
class Verdict:
    """The gate's decision on one adapter."""

    status: Status
    reason: str
    rules: tuple[RuleResult, ...]


def decide(evidence: Evidence, gate: GateSection) -> Verdict:
    """Evaluate every rule that applies to an adapter.

    Args:
        evidence: the adapter's measurements.
        gate: the recipe's gate section.
    """
    rules = (
        _learning(evidence, gate),
        *_forgetting(evidence, gate),
        *_forgetting_by_benchmark(evidence, gate.max_general_drop),
        *_serving(evidence, gate),
        *_champion(evidence, gate.min_gain_over_champion),
        *_metrics(evidence),
    )
    statuses = {rule.status for rule in rules}
    status: Status = "can't tell"
    if "reject" in statuses:
        status = "reject"
    elif statuses <= {"pass"}:
        status = "pass"
    reason = "; ".join(rule.reason for rule in rules if rule.status == status)
    return Verdict(status, reason, rules)


def _learning(evidence: Evidence, gate: GateSection) -> RuleResult:
    if evidence.control == "none":
        criterion = Criterion(
            name="gained on the task",
            measured="a task gain of {value:+.3f} over the base",
            required="above 0",
            count=evidence.examples,
            unit="held-out examples",
        )
        return criterion.evaluate(evidence.task_gain, MIN_POSITIVE)
    if evidence.gain_share is None:
        reason = (
            "the control's own task gain is not significant, so no fraction of it can be computed; "
            "train the control for more steps"
        )
        return RuleResult("learned enough", "can't tell", reason, beyond_items=True)
    criterion = Criterion(
        name="learned enough",
        measured="{value:.0%} of the control's gain",
        required="at least {bound:.0%}",
        count=evidence.examples,
        unit="held-out examples",
    )
    return criterion.evaluate(evidence.gain_share, gate.min_gain_share)


def _forgetting(evidence: Evidence, gate: GateSection) -> Iterator[RuleResult]:
    if evidence.general is None:
        if not evidence.open_changes:
            reason = (
                "no question of general ability could be scored; use questions that fit the context"
            )
            yield RuleResult("forgot little", "can't tell", reason, beyond_items=True)
        return
    measured = "general change {value:+.3f}"
    if evidence.general_metric == "accuracy":
        measured = "general change of accuracy {value:+.3f}"
    criterion = Criterion(
        name="forgot little",
        measured=measured,
        required="at least {bound:+.3f}",
        count=evidence.items,
        unit="items",
    )
    yield criterion.evaluate(evidence.general, -gate.max_general_drop)
    if evidence.beyond_control is not None:
        criterion = Criterion(
            name="forgot little more than the control",
            measured="{value:+.3f} relative to the control",
            required="at least {bound:+.3f}",
            count=evidence.items,
            unit="items",
        )
        yield criterion.evaluate(evidence.beyond_control, -gate.max_drop_beyond_control)


def _forgetting_by_benchmark(evidence: Evidence, drop: float) -> Iterator[RuleResult]:
    """Evaluate each benchmark of open questions.

    The largest drop is a drop of accuracy, or a fraction of the base's own score.
    """
    for one in evidence.open_changes:
        metric = "accuracy"
        scale = 1.0
        required = "at least {bound:+.3f}"
        if one.scale is not None:
            metric = "score"
            scale = one.scale
            required += f", {100 * drop:g}% of the base's {scale:.3f}"
        criterion = Criterion(
            name=f"forgot little of {one.benchmark}",
            measured=f"change of {metric} on {escape_braces(one.benchmark)} {{value:+.3f}}",
            required=required,
            count=one.items,
            unit=f"items of {one.benchmark}",
        )
        yield criterion.evaluate(one.change, -drop * scale)


def _serving(evidence: Evidence, gate: GateSection) -> Iterator[RuleResult]:
    megabytes = evidence.file_bytes / 1e6
    if gate.max_file_mb is not None:
        yield check_limit(
            "the file is small enough",
            megabytes,
            gate.max_file_mb,
            measured=f"a file of {megabytes:.3g} MB",
            unit=" MB",
        )
    if gate.max_rank is not None:
        yield check_limit(
            "the rank can be served",
            evidence.rank,
            gate.max_rank,
            measured=f"rank {evidence.rank}",
            unit="",
        )


def _champion(evidence: Evidence, min_gain: float | None) -> Iterator[RuleResult]:
    if min_gain is None:
        return
    if evidence.champion_objection is not None:
        reason = (
            f"the registered champion cannot be compared: {evidence.champion_objection}; "
            "set gate.min_gain_over_champion to null to skip the comparison"
        )
        yield RuleResult("beats the champion", "can't tell", reason, beyond_items=True)
    elif evidence.over_champion is not None:
        criterion = Criterion(
            name="beats the champion",
            measured="{value:+.3f} over the registered champion",
            required="at least {bound:+.3f}",
            count=evidence.examples,
            unit="held-out examples",
        )
        yield criterion.evaluate(evidence.over_champion, min_gain)


def _metrics(evidence: Evidence) -> Iterator[RuleResult]:
    name = "all metrics could be computed"
    if evidence.errors:
        reason = "not every metric could be computed: " + "; ".join(evidence.errors[:NAMED_ERRORS])
        unnamed = len(evidence.errors) - NAMED_ERRORS
        if unnamed > 0:
            reason += f"; and {unnamed} more"
        yield RuleResult(name, "can't tell", reason, beyond_items=True)
    elif evidence.answers:
        reason = f"every metric of {evidence.answers} answers could be computed"
        yield RuleResult(name, "pass", reason)
