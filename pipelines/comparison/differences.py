"""Differences between two models on the same items: paired, with intervals; positive is better.

The choice of the two models isolates one of three effects:

    quantization    the 4-bit base compared with the base in full precision: lost before training
    training        a model compared with the base it was trained on
    total           a model compared with the base in full precision: what a user gains or loses

Intervals are 95 % bootstrap intervals. For general abilities, items are resampled within their
benchmark and benchmarks have equal weight. A benchmark with a single item left is not counted,
since it has no variance. Each benchmark also has a p-value, and one adjusted for multiple
comparisons (Benjamini & Hochberg 1995): of twenty p-values, one is below 0.05 by chance.

Open questions, those without choices, are compared benchmark by benchmark: they have no choice
probability, and a task's own score may have any scale.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control

from pipelines.comparison.record_types import (
    ChatRecord,
    ChoiceRecord,
    GenerationRecord,
    LossRecord,
    PassageRecord,
    ScoreRecord,
    SingleAnswerRecord,
    TaskRecord,
)
from pipelines.comparison.records import (
    ABILITIES,
    Ability,
    Records,
    by_benchmark,
    check_paired,
    of_type,
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
    accuracy_benchmarks,
    choice_probability,
    margin,
    metric_names,
)

Samples = dict[str, Array]
"""Benchmark → the paired differences of its items."""


@dataclass(frozen=True)
class BenchmarkChange:
    """Change of choice probability on one benchmark, or of accuracy if it has no choices."""

    mean: float
    low: float
    high: float
    p_value: float
    """Of a paired sign-flip permutation test."""
    adjusted_p: float
    """Adjusted over all benchmarks of the change."""


@dataclass(frozen=True)
class Change:
    """Difference between two models; positive is better, and None means not evaluated."""

    task_gain: Interval
    """Decrease of the task loss, nats per token."""
    choice_probability: Interval | None
    accuracy: Interval | None
    margin: Interval | None
    """Nats per byte."""
    text_loss: Interval | None
    """Decrease, nats per byte."""
    chat_loss: Interval | None
    """Decrease, nats per token."""
    generation: dict[str, Interval]
    """Metric → its increase, over the answers for which both models have it."""
    benchmarks: dict[str, BenchmarkChange]


def change(before: Records, after: Records) -> Change:
    """Compare two models item by item.

    Args:
        before: records of the model that the other is compared with.
        after: records of the model in question.

    Raises:
        ValueError: the two were not scored on the same items in the same order.
    """
    check_paired(before, after)
    choices = _differences(
        by_benchmark(before, ChoiceRecord),
        by_benchmark(after, ChoiceRecord),
        (choice_probability, margin),
    )
    correct = _differences(accuracy_benchmarks(before), accuracy_benchmarks(after), (accuracy,))
    smooth: Sequence[Interval | None] = (None, None)
    if choices:
        smooth = mean_intervals(list(choices.values()))
    correct_change = mean_intervals(list(correct.values()))[0] if correct else None
    choice_samples = _first_metric(choices)
    return Change(
        task_gain=task_gain(before, after),
        choice_probability=smooth[0],
        accuracy=correct_change,
        margin=smooth[1],
        text_loss=_loss_decrease(of_type(before, PassageRecord), of_type(after, PassageRecord)),
        chat_loss=_loss_decrease(of_type(before, ChatRecord), of_type(after, ChatRecord)),
        generation=_generation(before, after),
        benchmarks=_benchmarks(choice_samples, before, after),
    )


def task_gain(before: Records, after: Records) -> Interval:
    """Return the decrease of the task loss, in nats per supervised token.

    Args:
        before: has the loss of each held-out example.
        after: has the loss of the same examples.
    """
    tokens = _units(of_type(before, TaskRecord))
    return ratio_interval(task_differences(before, after), tokens)


def task_differences(before: Records, after: Records) -> Array:
    """Return the decrease of each held-out example's summed negative log-likelihood.

    Args:
        before: records of n held-out examples, and any others.
        after: records of the same examples.

    Returns:
        (n,) in nats.
    """
    return _losses(of_type(before, TaskRecord)) - _losses(of_type(after, TaskRecord))


def gain_share(base: Records, control: Records, adapter: Records) -> Interval | None:
    """Return the adapter's task gain over the full-precision base as a fraction of the control's.

    None if the control's own gain is not significantly positive: a fraction of nothing, or of a
    loss, is meaningless.

    Args:
        base: records of the base in full precision.
        control: records of full fine-tuning, or of what replaces it.
        adapter: records of an adapter.
    """
    if task_gain(base, control).low <= 0:
        return None
    return ratio_interval(task_differences(base, adapter), task_differences(base, control))


def general_metric(records: Records) -> str:
    """Return the name of the metric of general abilities.

    It is choice_probability, or accuracy if no question has choices.
    """
    choices = by_benchmark(records, ChoiceRecord).values()
    has_choices = any(len(rows) > 1 for rows in choices)
    return "choice_probability" if has_choices else "accuracy"


def general_samples(before: Records, after: Records) -> Samples:
    """Return the paired differences of the metric of general abilities; no task's own score.

    Args:
        before: decides which metric is compared.
        after: records of the same items.
    """
    if general_metric(before) == "accuracy":
        return _samples(before, after, (ChoiceRecord, SingleAnswerRecord), accuracy)
    return _samples(before, after, (ChoiceRecord,), choice_probability)


def open_samples(before: Records, after: Records) -> Samples:
    """Return the paired differences of accuracy or own score, on benchmarks without choices.

    Args:
        before: records of one model.
        after: records of the same items.
    """
    return _samples(before, after, (SingleAnswerRecord, ScoreRecord), accuracy)


def score_scales(records: Records) -> dict[str, float]:
    """Return the mean absolute score on each task with its own score, the unit of its drops."""
    scales = {}
    for name, rows in by_benchmark(records, ScoreRecord).items():
        magnitudes = [abs(accuracy(row)) for row in rows]
        scales[name] = float(np.mean(magnitudes))
    return scales


def general_change(before: Records, after: Records) -> Interval | None:
    """Return the change of general abilities; None if no benchmark has two items left.

    Args:
        before: records of one model.
        after: records of the same items.
    """
    samples = general_samples(before, after)
    return mean_interval(*samples.values()) if samples else None


def displayed_change(before: Records, after: Records) -> Interval | None:
    """Return the change that plots show: of general abilities or, without these, of own scores.

    A mean of scores may mix different scales: it is shown and never judged.

    Args:
        before: records of one model.
        after: records of the same items.
    """
    samples = general_samples(before, after) or open_samples(before, after)
    return mean_interval(*samples.values()) if samples else None


def drop_beyond_control(
    control: Records, adapter: Records, *, control_base: Records, adapter_base: Records
) -> Interval | None:
    """Return the adapter's change of general abilities minus the control's, each from its base.

    Args:
        control: full fine-tuning, or what replaces it.
        adapter: LoRA or QLoRA.
        control_base: what the control was trained on.
        adapter_base: what the adapter was trained on.
    """
    control_samples = general_samples(control_base, control)
    adapter_samples = general_samples(adapter_base, adapter)
    beyond = []
    for name, values in adapter_samples.items():
        beyond.append(values - control_samples[name])
    return mean_interval(*beyond) if beyond else None


def _differences(
    before: Mapping[str, Sequence[Ability]],
    after: Mapping[str, Sequence[Ability]],
    metrics: Sequence[Callable[[Ability], float]],
) -> dict[str, Array]:
    """Return the increase of each metric of each item, (metrics, n).

    Benchmarks with fewer than two items are left out.
    """
    differences = {}
    for name, rows in before.items():
        if len(rows) > 1:
            differences[name] = _table(after[name], metrics) - _table(rows, metrics)
    return differences


def _samples(
    before: Records,
    after: Records,
    types: Sequence[type[Ability]],
    metric: Callable[[Ability], float],
) -> Samples:
    """Return the increase of one metric of each item, for each benchmark of the given types."""
    first = by_benchmark(before, *types)
    second = by_benchmark(after, *types)
    return _first_metric(_differences(first, second, (metric,)))


def _first_metric(differences: Mapping[str, Array]) -> Samples:
    return {name: values[0] for name, values in differences.items()}


def _table(records: Sequence[Ability], metrics: Sequence[Callable[[Ability], float]]) -> Array:
    rows = []
    for metric in metrics:
        rows.append([metric(record) for record in records])
    return np.array(rows, dtype=np.float64)


def _benchmarks(smooth: Samples, before: Records, after: Records) -> dict[str, BenchmarkChange]:
    """Compare each benchmark on its own: by choice probability if it has one, else by accuracy."""
    samples = {**_samples(before, after, ABILITIES, accuracy), **smooth}
    p_values = [sign_flip_p_value(values) for values in samples.values()]
    adjusted = false_discovery_control(p_values, method="bh") if p_values else []
    changes = {}
    for name, p_value, adjusted_p in zip(samples, p_values, adjusted, strict=True):
        result = mean_interval(samples[name])
        changes[name] = BenchmarkChange(
            mean=result.mean,
            low=result.low,
            high=result.high,
            p_value=round(p_value, 6),
            adjusted_p=round(float(adjusted_p), 6),
        )
    return changes


def _generation(before: Records, after: Records) -> dict[str, Interval]:
    first = of_type(before, GenerationRecord)
    second = of_type(after, GenerationRecord)
    if not (first and second):  # a model that only the frontier shows has no answers
        return {}
    intervals = {}
    for name in metric_names([*first, *second]):
        increases = _increases(first, second, name)
        if len(increases) > 1:
            intervals[name] = mean_interval(increases)
    return intervals


def _increases(
    first: Sequence[GenerationRecord], second: Sequence[GenerationRecord], name: str
) -> Array:
    """Return the increase of a metric for each answer for which both models have it."""
    increases = []
    for before, after in zip(first, second, strict=True):
        old = before.metrics.get(name)
        new = after.metrics.get(name)
        if old is not None and new is not None:
            increases.append(new - old)
    return np.array(increases, dtype=np.float64)


def _loss_decrease(before: Sequence[LossRecord], after: Sequence[LossRecord]) -> Interval | None:
    """Return the decrease of the loss per token or byte; None for fewer than two items."""
    if min(len(before), len(after)) < 2:
        return None
    return ratio_interval(_losses(before) - _losses(after), _units(before))


def _losses(records: Sequence[LossRecord]) -> Array:
    return np.array([record.nll for record in records], dtype=np.float64)


def _units(records: Sequence[LossRecord]) -> Array:
    return np.array([record.units for record in records], dtype=np.float64)
