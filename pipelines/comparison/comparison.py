"""The summary of a run: every model's metrics, every adapter's verdict, and the adapter to promote.

A pure function from stage results and item records to the plain values of summary.json. Reports and
the registry read nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipelines.comparison.differences import (
    change,
    general_metric,
    general_samples,
    open_samples,
    score_scales,
    task_gain,
)
from pipelines.comparison.evidence import measure
from pipelines.comparison.frontier import (
    FrontierPoint,
    FrontierVariant,
    frontier_point,
    recommend,
)
from pipelines.comparison.gate import decide
from pipelines.comparison.inputs import (
    BASE,
    CONTROL,
    QUANTIZED_BASE,
    ComparedChampion,
    ComparedModel,
    ComparisonContext,
    ComparisonInputs,
)
from pipelines.comparison.power import power_of
from pipelines.comparison.records import Records, align
from pipelines.comparison.resampling import Interval
from pipelines.comparison.scores import scores
from pipelines.config.recipe import Recipe

__all__ = [
    "BASE",
    "CONTROL",
    "QUANTIZED_BASE",
    "ComparedChampion",
    "ComparedModel",
    "ComparisonContext",
    "FrontierVariant",
    "compare",
]
Values = dict[str, Any]


def compare(
    recipe: Recipe,
    trained: Sequence[ComparedModel],
    items: Mapping[str, Records],
    context: ComparisonContext | None = None,
) -> Values:
    """Return the metrics of the base, the control and each adapter, and the decision.

    Args:
        recipe: its gate, control and training sections are used.
        trained: the control, if there is one, and the adapters, in the order of the report.
        items: label → item records, for the base, the base in 4 bits (if adapters train over it),
            each trained model, each variant and the registered champion.
        context: optional inputs.

    Raises:
        ValueError: two models were not scored on the same items.
    """
    inputs = ComparisonInputs(recipe, tuple(trained), align(items), context or ComparisonContext())
    models = {}
    for label in (BASE, QUANTIZED_BASE):
        if label in items:
            models[label] = _base(inputs, label)
    for model in trained:
        models[model.label] = _trained(inputs, model)
    for model in inputs.adapters:
        models[model.label] |= _judged(inputs, model)
    adapters = {model.label: models[model.label] for model in inputs.adapters}
    points = _points(inputs)
    recommended = recommend(points, _with_status(adapters, "pass"), inputs.items)
    return {
        "models": models,
        **_decision(adapters),
        "recommended": None if recommended is None else asdict(recommended),
        "control": inputs.control,
        "incumbent": _champion(inputs),
        "general_figure": general_metric(inputs.items[BASE]),
        "frontier": [asdict(point) for point in points],
    }


def _base(inputs: ComparisonInputs, label: str) -> Values:
    """Return a base's metrics; the change of the 4-bit base is the cost of quantization."""
    if label == BASE:
        return {"scores": _scores(inputs, label)}
    return {
        "scores": _scores(inputs, label),
        "change": _effect(inputs, BASE, label),
        "power": _power(inputs, BASE, label),
    }


def _trained(inputs: ComparisonInputs, model: ComparedModel) -> Values:
    """Return a trained model's metrics, its change by training and its total change."""
    before = inputs.base_of(inputs.variant(model))
    by_training = _effect(inputs, before, model.label)
    total = by_training if before == BASE else _effect(inputs, BASE, model.label)
    return {
        **asdict(model),
        "scores": _scores(inputs, model.label),
        "change": by_training,
        "total": total,
        "power": _power(inputs, before, model.label),
    }


def _judged(inputs: ComparisonInputs, model: ComparedModel) -> Values:
    """Return an adapter's comparison with the control, and its verdict."""
    evidence = measure(inputs, model)
    verdict = decide(evidence, inputs.recipe.gate.model_dump())
    return {
        "gain_share": _interval_values(evidence.gain_share),
        "beyond_control": _interval_values(evidence.beyond_control),
        "verdict": asdict(verdict),
    }


def _interval_values(interval: Interval | None) -> Values | None:
    return None if interval is None else asdict(interval)


def _scores(inputs: ComparisonInputs, label: str) -> Values:
    section = inputs.recipe.evaluation
    metrics = list(section.metrics)
    if section.execute:
        metrics.append("execution")
    return asdict(scores(inputs.items[label], metrics))


def _effect(inputs: ComparisonInputs, before: str, after: str) -> Values:
    """Return the difference between two models; KL divergence only if both have distributions."""
    values = asdict(change(inputs.items[before], inputs.items[after]))
    divergence = inputs.divergences.get((before, after))
    if divergence is None:
        return {**values, "kl": None, "kl_interval": None}
    return {
        **values,
        "kl": divergence.mean,
        "kl_interval": _interval_values(divergence.interval),
    }


def _power(inputs: ComparisonInputs, before: str, after: str) -> Values | None:
    """Return what the general items can detect, together and by benchmark.

    It is None if no benchmark has two items left. For a task with its own score, drops are in that
    score; the scores of several tasks have no common bound.
    """
    first = inputs.items[before]
    second = inputs.items[after]
    drop = inputs.recipe.gate.max_general_drop
    general = general_samples(first, second)
    separate = open_samples(first, second)
    scales = score_scales(first)
    every = {**general, **separate}
    if not every:
        return None
    if general:
        pooled = power_of(list(general.values()), drop)
    else:
        pooled = power_of(list(separate.values()), 0)
    benchmarks = {}
    for name, values in every.items():
        scaled_drop = drop * scales.get(name, 1)
        benchmarks[name] = asdict(power_of([values], scaled_drop))
    return {**asdict(pooled), "benchmarks": benchmarks}


def _champion(inputs: ComparisonInputs) -> Values | None:
    """Return the registered champion, with a sentence about its comparison."""
    champion = inputs.context.champion
    if champion is None:
        return None
    subject = f"The registered champion, version {champion.version},"
    if inputs.champion_here is not None:
        label = inputs.champion_here.label
        words = f"{subject} is identical to {label} of this run and need not be beaten."
    elif champion.objection is not None:
        words = f"{subject} could not be compared: {champion.objection}."
    else:
        gain = task_gain(inputs.items[BASE], inputs.items[champion.label])
        words = f"{subject} gains {gain.mean:+.3f} nats per token over the base on the same items."
    return {**asdict(champion), "label": champion.label, "words": words}


def _points(inputs: ComparisonInputs) -> list[FrontierPoint]:
    """Return the frontier point of every scored model, the compared ones first."""
    variants = [(inputs.variant(model), True) for model in inputs.trained]
    variants += [(variant, False) for variant in inputs.context.variants]
    points = []
    for variant, trained in variants:
        point = frontier_point(
            variant,
            inputs.items[variant.label],
            full_precision_base=inputs.items[BASE],
            training_base=inputs.items[inputs.base_of(variant)],
            trained=trained,
        )
        points.append(point)
    return points


def _decision(adapters: Mapping[str, Any]) -> Values:
    """Choose the candidate, the last adapter that is not rejected, and the champion.

    The champion is the adapter with the largest gain among those that pass.
    """
    kept = _with_status(adapters, "pass", "can't tell")
    gains = {}
    for label in _with_status(adapters, "pass"):
        total = adapters[label]["total"]
        gains[label] = total["task_gain"]["mean"]
    champion = max(gains, key=lambda label: gains[label], default=None)
    if champion is not None:
        reason = (
            f"{champion} passes and gains most on the task "
            f"({gains[champion]:+.3f} nats per token over the base)"
        )
    else:
        reasons = []
        for label, model in adapters.items():
            reasons.append(f"{label}: {model['verdict']['reason']}")
        reason = "no adapter passes: " + "; ".join(reasons)
    candidate = kept[-1] if kept else None
    return {"candidate": candidate, "champion": champion, "decision": reason}


def _with_status(adapters: Mapping[str, Any], *statuses: str) -> list[str]:
    labels = []
    for label, model in adapters.items():
        if model["verdict"]["status"] in statuses:
            labels.append(label)
    return labels
