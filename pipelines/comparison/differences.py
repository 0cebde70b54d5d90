"""How one model differs from another on the same items: paired, with intervals, and positive where it is better.

Three effects are told apart by what is held against what:

    quantisation    the 4-bit base against the base in full precision: lost before anything is trained
    training        a model against the base it was trained on
    total           a model against the base in full precision: what a user gains or loses by switching

Intervals are 95 % bootstrap intervals. For general abilities items are drawn within their benchmark and benchmarks
weigh the same; one of which a single item is left says nothing of chance and is not counted. Each benchmark also has a
p-value, and one adjusted for there being several (Benjamini & Hochberg 1995): of twenty, one falls below 0.05 by chance.

Open questions, those without choices, are held benchmark by benchmark: they have no choice probability, and a task's own
score may have any scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control

from pipelines.comparison.records import (
    ABILITIES,
    Record,
    Records,
    by_benchmark,
    check_paired,
    scored,
)
from pipelines.comparison.resampling import (
    Array,
    Interval,
    mean_interval,
    mean_intervals,
    ratio_interval,
    sign_flip_p_value,
)
from pipelines.comparison.scores import (
    accuracy,
    choice_probability,
    margin,
    metric_names,
    right_or_wrong,
)

Samples = dict[str, Array]
"""Benchmark → the paired differences of its items."""


@dataclass(frozen=True)
class BenchmarkChange:
    """Change of choice probability on one benchmark, or of accuracy where its questions have no choices."""

    mean: float
    low: float
    high: float
    p_value: float
    """Of a paired sign-flip permutation test."""
    adjusted_p: float
    """Adjusted over all benchmarks of the change."""


@dataclass(frozen=True)
class Change:
    """How one model differs from another; positive is better, and what was not asked is None."""

    task_gain: Interval
    """Fall of the task loss, nats per token."""
    choice_probability: Interval | None
    accuracy: Interval | None
    margin: Interval | None
    """Nats per byte."""
    text_loss: Interval | None
    """Fall of it, nats per byte."""
    chat_loss: Interval | None
    """Fall of it, nats per token."""
    generation: dict[str, Interval]
    """Metric → its rise, over the answers that have it from both models."""
    benchmarks: dict[str, BenchmarkChange]


def change(before: Records, after: Records) -> Change:
    """Compare two models item by item.

    Raises:
        ValueError: the two were not scored on the same items in the same order.
    """
    check_paired(before, after)
    choices = _differences(
        by_benchmark(before, "general"),
        by_benchmark(after, "general"),
        (choice_probability, margin),
    )
    correct = _differences(right_or_wrong(before), right_or_wrong(after), (accuracy,))
    smooth = mean_intervals(list(choices.values())) if choices else (None, None)
    return Change(
        task_gain=task_gain(before, after),
        choice_probability=smooth[0],
        accuracy=mean_intervals(list(correct.values()))[0] if correct else None,
        margin=smooth[1],
        text_loss=_fall(before, after, "text", "bytes"),
        chat_loss=_fall(before, after, "chat", "tokens"),
        generation=_generation(before, after),
        benchmarks=_benchmarks(
            {name: values[0] for name, values in choices.items()}, before, after
        ),
    )


def task_gain(before: Records, after: Records) -> Interval:
    """Return the fall of the task loss, in nats per supervised token."""
    return ratio_interval(
        task_differences(before, after), _column(scored(before, "task"), "tokens")
    )


def task_differences(before: Records, after: Records) -> Array:
    """Return, for each held-out example, how much its summed negative log-likelihood fell."""
    return _column(scored(before, "task"), "nll") - _column(scored(after, "task"), "nll")


def gain_share(base: Records, control: Records, adapter: Records) -> Interval | None:
    """Return the adapter's task gain over the full-precision base as a share of the control's.

    None where the control itself did not surely learn: a share of nothing, or of a loss, says nothing.
    """
    if task_gain(base, control).low <= 0:
        return None
    return ratio_interval(task_differences(base, adapter), task_differences(base, control))


def general_figure(records: Records) -> str:
    """Return which figure stands for general abilities: choice_probability, or accuracy where no question has choices."""
    choices = by_benchmark(records, "general").values()
    return "choice_probability" if any(len(rows) > 1 for rows in choices) else "accuracy"


def general_samples(before: Records, after: Records) -> Samples:
    """Return the paired differences of the figure that stands for general abilities; nothing of tasks that rate themselves."""
    if general_figure(before) == "accuracy":
        return _samples(before, after, ("general", "answer"), accuracy)
    return _samples(before, after, ("general",), choice_probability)


def open_samples(before: Records, after: Records) -> Samples:
    """Return the paired differences of accuracy on each benchmark without choices, or of the score by which it rates itself."""
    return _samples(before, after, ("answer", "score"), accuracy)


def score_scales(records: Records) -> dict[str, float]:
    """Return, for each benchmark that rates itself, the mean absolute score of a model: what a drop is a share of."""
    return {
        name: float(np.mean([abs(accuracy(one)) for one in rows]))
        for name, rows in by_benchmark(records, "score").items()
    }


def general_change(before: Records, after: Records) -> Interval | None:
    """Return the change of general abilities; None where no benchmark has two items left."""
    samples = general_samples(before, after)
    return mean_interval(*samples.values()) if samples else None


def pictured_change(before: Records, after: Records) -> Interval | None:
    """Return the change of general abilities that is drawn: where only tasks that rate themselves were asked, of their scores.

    A mean of scores may be one of unlike scales: it is shown and never judged.
    """
    samples = general_samples(before, after) or open_samples(before, after)
    return mean_interval(*samples.values()) if samples else None


def drop_beyond_control(
    bases: tuple[Records, Records], control: Records, adapter: Records
) -> Interval | None:
    """Return the adapter's change of general abilities less the control's, each over the base it was trained on.

    Args:
        bases: what the control and what the adapter was trained on.
        control: full fine-tuning, or what takes its place.
        adapter: LoRA or QLoRA.
    """
    of_control, of_adapter = general_samples(bases[0], control), general_samples(bases[1], adapter)
    beyond = [of_adapter[name] - of_control[name] for name in of_adapter]
    return mean_interval(*beyond) if beyond else None


def _differences(
    before: dict[str, list[Record]],
    after: dict[str, list[Record]],
    figures: Sequence[Callable[[Record], float]],
) -> dict[str, Array]:
    """Return, for each benchmark with two items or more, how much each figure of each item rose, (figures, n)."""
    return {
        name: _table(after[name], figures) - _table(rows, figures)
        for name, rows in before.items()
        if len(rows) > 1
    }


def _samples(
    before: Records, after: Records, kinds: Sequence[str], figure: Callable[[Record], float]
) -> Samples:
    """Return, for each benchmark of some kinds, how much one figure of each item rose."""
    differences = _differences(by_benchmark(before, *kinds), by_benchmark(after, *kinds), (figure,))
    return {name: values[0] for name, values in differences.items()}


def _table(records: Records, figures: Sequence[Callable[[Record], float]]) -> Array:
    return np.array(
        [[figure(record) for record in records] for figure in figures], dtype=np.float64
    )


def _benchmarks(smooth: Samples, before: Records, after: Records) -> dict[str, BenchmarkChange]:
    """Hold each benchmark by itself: by choice probability where it has one, else by accuracy."""
    samples = {**_samples(before, after, ABILITIES, accuracy), **smooth}
    p_values = [sign_flip_p_value(values) for values in samples.values()]
    adjusted = false_discovery_control(p_values, method="bh") if p_values else []
    changes = {}
    for (name, values), p_value, adjusted_p in zip(
        samples.items(), p_values, adjusted, strict=True
    ):
        found = mean_interval(values)
        changes[name] = BenchmarkChange(
            found.mean, found.low, found.high, round(p_value, 6), round(float(adjusted_p), 6)
        )
    return changes


def _generation(before: Records, after: Records) -> dict[str, Interval]:
    first, second = scored(before, "generation"), scored(after, "generation")
    if not (first and second):  # a model that only the picture shows wrote no answers
        return {}
    pairs = [(one["metrics"], other["metrics"]) for one, other in zip(first, second, strict=True)]
    rises = {
        name: [b[name] - a[name] for a, b in pairs if name in a and name in b]
        for name in metric_names([*first, *second])
    }
    return {
        name: mean_interval(np.array(values, dtype=np.float64))
        for name, values in rises.items()
        if len(values) > 1
    }


def _fall(before: Records, after: Records, kind: str, unit: str) -> Interval | None:
    """Return how much a loss per unit fell; None for fewer than two items."""
    first, second = scored(before, kind), scored(after, kind)
    if min(len(first), len(second)) < 2:
        return None
    return ratio_interval(_column(first, "nll") - _column(second, "nll"), _column(first, unit))


def _column(records: Records, name: str) -> Array:
    return np.array([record[name] for record in records], dtype=np.float64)
