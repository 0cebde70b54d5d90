"""The summary of a run: every model's metrics, every adapter's verdict, and the adapter to promote.

A pure function from stage results and item records to the comparison in summary.json.
"""

from collections.abc import Mapping, Sequence

from pipelines.comparison.comparison_inputs import (
    BASE,
    CONTROL,
    QUANTIZED_BASE,
    ComparedChampion,
    ComparedModel,
    ComparisonContext,
    ComparisonInputs,
)
from pipelines.comparison.differences import (
    change,
    general_metric,
    general_samples,
    open_samples,
    score_scales,
    task_gain,
)
from pipelines.comparison.document import (
    Comparison,
    DetectableDrop,
    Effect,
    Judgment,
    ModelSummary,
    RegisteredChampion,
    TrainedModel,
)
from pipelines.comparison.evidence import measure
from pipelines.comparison.frontier import (
    FrontierPoint,
    FrontierVariant,
    frontier_point,
    recommend,
)
from pipelines.comparison.gate import decide
from pipelines.comparison.power import power_of
from pipelines.comparison.records import Records, align
from pipelines.comparison.scores import Scores, scores
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


def compare(
    recipe: Recipe,
    trained: Sequence[ComparedModel],
    items: Mapping[str, Records],
    context: ComparisonContext | None = None,
) -> Comparison:
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
    adapters = {model.label: models[model.label] for model in inputs.adapters}
    points = _points(inputs)
    champion = _champion(adapters)
    candidates = _with_status(adapters, "pass", "can't tell")
    return Comparison(
        models=models,
        candidate=candidates[-1] if candidates else None,
        champion=champion,
        decision=_decision(adapters, champion),
        recommended=recommend(points, _with_status(adapters, "pass"), inputs.items),
        control=inputs.control,
        registered_champion=_registered_champion(inputs),
        general_metric=general_metric(inputs.items[BASE]),
        frontier=tuple(points),
    )


def _base(inputs: ComparisonInputs, label: str) -> ModelSummary:
    """Return a base's metrics; the change of the 4-bit base is the cost of quantization."""
    if label == BASE:
        return ModelSummary(scores=_scores(inputs, label))
    return ModelSummary(
        scores=_scores(inputs, label),
        change=_effect(inputs, BASE, label),
        power=_power(inputs, BASE, label),
    )


def _trained(inputs: ComparisonInputs, model: ComparedModel) -> ModelSummary:
    """Return a trained model's metrics, its change by training and its total change."""
    before = inputs.base_of(inputs.variant(model))
    by_training = _effect(inputs, before, model.label)
    total = by_training if before == BASE else _effect(inputs, BASE, model.label)
    training = TrainedModel(
        rank=model.rank,
        key=model.key,
        folder=model.folder,
        result=model.result,
        adapter=model.adapter,
    )
    return ModelSummary(
        scores=_scores(inputs, model.label),
        change=by_training,
        total=total,
        power=_power(inputs, before, model.label),
        training=training,
        judgment=None if model.label == CONTROL else _judgment(inputs, model),
    )


def _judgment(inputs: ComparisonInputs, model: ComparedModel) -> Judgment:
    """Return an adapter's comparison with the control, and its verdict."""
    evidence = measure(inputs, model)
    return Judgment(
        gain_share=evidence.gain_share,
        beyond_control=evidence.beyond_control,
        verdict=decide(evidence, inputs.recipe.gate),
    )


def _scores(inputs: ComparisonInputs, label: str) -> Scores:
    section = inputs.recipe.evaluation
    metrics = list(section.metrics)
    if section.execute:
        metrics.append("execution")
    return scores(inputs.items[label], metrics)


def _effect(inputs: ComparisonInputs, before: str, after: str) -> Effect:
    """Return the difference between two models; KL divergence only if both have distributions."""
    difference = change(inputs.items[before], inputs.items[after])
    divergence = inputs.divergences.get((before, after))
    if divergence is None:
        return Effect(**vars(difference))
    return Effect(**vars(difference), kl=divergence.mean, kl_interval=divergence.interval)


def _power(inputs: ComparisonInputs, before: str, after: str) -> DetectableDrop | None:
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
        benchmarks[name] = power_of([values], scaled_drop)
    return DetectableDrop(**vars(pooled), benchmarks=benchmarks)


def _registered_champion(inputs: ComparisonInputs) -> RegisteredChampion | None:
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
    return RegisteredChampion(
        version=champion.version,
        adapter_sha256=champion.adapter_sha256,
        objection=champion.objection,
        label=champion.label,
        words=words,
    )


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


def _champion(adapters: Mapping[str, ModelSummary]) -> str | None:
    """Return the adapter with the largest gain among those that pass; None if none passes."""
    gains = {}
    for label in _with_status(adapters, "pass"):
        gains[label] = _gain(adapters[label])
    return max(gains, key=lambda label: gains[label], default=None)


def _decision(adapters: Mapping[str, ModelSummary], champion: str | None) -> str:
    if champion is not None:
        return (
            f"{champion} passes and gains most on the task "
            f"({_gain(adapters[champion]):+.3f} nats per token over the base)"
        )
    reasons = []
    for label, model in adapters.items():
        assert model.judgment is not None, "an adapter is judged"
        reasons.append(f"{label}: {model.judgment.verdict.reason}")
    return "no adapter passes: " + "; ".join(reasons)


def _gain(model: ModelSummary) -> float:
    assert model.total is not None, "a trained model has a total change"
    return model.total.task_gain.mean


def _with_status(adapters: Mapping[str, ModelSummary], *statuses: str) -> list[str]:
    labels = []
    for label, model in adapters.items():
        if model.judgment is not None and model.judgment.verdict.status in statuses:
            labels.append(label)
    return labels
