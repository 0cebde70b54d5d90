"""The summary of a run: every model's figures, every adapter's verdict, and which adapter is put forward.

A pure function from stage results and item records to the plain values of summary.json; reports and the registry
read nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipelines.comparison.case import (
    BASE,
    CONTROL,
    QUANTIZED_BASE,
    Beside,
    Case,
    Incumbent,
    Trained,
)
from pipelines.comparison.differences import (
    change,
    drop_beyond_control,
    gain_share,
    general_change,
    general_figure,
    general_samples,
    open_samples,
    score_scales,
    task_gain,
)
from pipelines.comparison.frontier import Point, Variant, place, recommend
from pipelines.comparison.gate import Evidence, OpenChange, decide
from pipelines.comparison.power import power_of
from pipelines.comparison.records import Records, align, scored
from pipelines.comparison.resampling import Interval, mean_interval
from pipelines.comparison.scores import metric_errors, scores
from pipelines.config.recipe import Recipe

__all__ = [
    "BASE",
    "CONTROL",
    "QUANTIZED_BASE",
    "Beside",
    "Incumbent",
    "Trained",
    "Variant",
    "compare",
]
Values = dict[str, Any]


def compare(
    recipe: Recipe,
    trained: Sequence[Trained],
    items: Mapping[str, Records],
    beside: Beside | None = None,
) -> Values:
    """Return the figures of the base, the control and each adapter, and the decision.

    Args:
        recipe: its gate, control and training are read.
        trained: the control, unless there is none, and the adapters, in the order of the report.
        items: label → item records, for the base, the base in 4 bits (where adapters train over it), each trained model,
            each variant and the registered champion.
        beside: what else is known.

    Raises:
        ValueError: two models were not scored on the same items.
    """
    case = Case(recipe, tuple(trained), align(items), beside or Beside())
    models = {label: _base(case, label) for label in (BASE, QUANTIZED_BASE) if label in items}
    models |= {model.label: _trained(case, model) for model in trained}
    for model in case.adapters:
        models[model.label] |= _judged(case, model)
    adapters = {model.label: models[model.label] for model in case.adapters}
    points = _points(case)
    recommended = recommend(points, _with_status(adapters, "pass"), case.items)
    return {
        "models": models,
        **_decision(adapters),
        "recommended": asdict(recommended) if recommended is not None else None,
        "control": case.control,
        "incumbent": _incumbent(case),
        "general_figure": general_figure(case.items[BASE]),
        "frontier": [asdict(one) for one in points],
    }


def _base(case: Case, label: str) -> Values:
    """Return a base's figures; the change of the one in 4 bits is what quantisation costs."""
    own = {"scores": _scores(case, label)}
    return (
        own
        if label == BASE
        else {**own, "change": _effect(case, BASE, label), "power": _power(case, BASE, label)}
    )


def _trained(case: Case, model: Trained) -> Values:
    """Return a trained model's figures, what its training changed and what has changed in all."""
    before = case.base_of(case.variant(model))
    by_training = _effect(case, before, model.label)
    return {
        **asdict(model),
        "scores": _scores(case, model.label),
        "change": by_training,
        "total": by_training if before == BASE else _effect(case, BASE, model.label),
        "power": _power(case, before, model.label),
    }


def _judged(case: Case, model: Trained) -> Values:
    """Return an adapter's figures beside the control's, and its verdict."""
    evidence = _evidence(case, model)
    return {
        "gain_share": asdict(evidence.gain_share) if evidence.gain_share is not None else None,
        "beyond_control": asdict(evidence.beyond_control)
        if evidence.beyond_control is not None
        else None,
        "verdict": asdict(decide(evidence, case.recipe.gate.model_dump())),
    }


def _scores(case: Case, label: str) -> Values:
    section = case.recipe.evaluation
    return asdict(
        scores(case.items[label], (*section.metrics, *(["execution"] if section.execute else [])))
    )


def _effect(case: Case, before: str, after: str) -> Values:
    """Return how one model differs from another; the KL divergence only where both have distributions."""
    moved = case.divergences.get((before, after))
    known = {"mean": None, "interval": None} if moved is None else asdict(moved)
    return {
        **asdict(change(case.items[before], case.items[after])),
        "kl": known["mean"],
        "kl_interval": known["interval"],
    }


def _power(case: Case, before: str, after: str) -> Values | None:
    """Return what the general items can tell, together and by benchmark; None where no benchmark has two left.

    Of a benchmark that rates itself, drops are in its own score; scores of several have no common bound.
    """
    first, second, drop = case.items[before], case.items[after], case.recipe.gate.max_general_drop
    general, apart, scales = (
        general_samples(first, second),
        open_samples(first, second),
        score_scales(first),
    )
    every = {**general, **apart}
    if not every:
        return None
    pooled = power_of(list((general or apart).values()), drop if general else 0)
    single = {
        name: asdict(power_of([values], drop * scales.get(name, 1)))
        for name, values in every.items()
    }
    return {**asdict(pooled), "benchmarks": single}


def _evidence(case: Case, model: Trained) -> Evidence:
    assert model.rank is not None, "an adapter has a rank"
    own, base, before = (
        case.items[label] for label in (model.label, BASE, case.base_of(case.variant(model)))
    )
    share, beyond = _beside_control(case, before, own)
    rival = _rival(case)
    return Evidence(
        control=case.recipe.control.method,
        task_gain=task_gain(base, own),
        gain_share=share,
        general=general_change(before, own),
        general_figure=general_figure(base),
        beyond_control=beyond,
        open_changes=_open_changes(before, own),
        file_bytes=model.figures["file_bytes"],
        rank=model.figures.get(
            "file_rank", model.rank
        ),  # a start from the weight doubles it in the file
        over_champion=_over_champion(case, model),
        champion_objection=None if rival is None else rival.objection,
        errors=metric_errors(own),
        examples=len(scored(own, "task")),
        items=sum(len(values) for values in general_samples(before, own).values()),
        answers=len(scored(own, "generation")),
    )


def _beside_control(
    case: Case, before: Records, own: Records
) -> tuple[Interval | None, Interval | None]:
    """Return an adapter's share of the control's gain and its change beyond the control's; None and None without one."""
    control = next((model for model in case.trained if model.label == CONTROL), None)
    if control is None:
        return None, None
    records, control_base = case.items[CONTROL], case.items[case.base_of(case.variant(control))]
    return gain_share(case.items[BASE], records, own), drop_beyond_control(
        (control_base, before), records, own
    )


def _open_changes(before: Records, own: Records) -> tuple[OpenChange, ...]:
    """Return the change of each benchmark of open questions, unless one of them is all there is to general abilities."""
    samples, scales = open_samples(before, own), score_scales(before)
    held = [name for name in samples if list(general_samples(before, own)) != [name]]
    return tuple(
        OpenChange(name, mean_interval(samples[name]), scales.get(name), len(samples[name]))
        for name in held
    )


def _rival(case: Case) -> Incumbent | None:
    """Return the registered champion that every adapter has to beat; None where there is none, or it is one of them.

    A run that is repeated finds the adapter that it promoted, and its verdicts must not change: which of its adapters is
    the best is decided among those that pass.
    """
    return case.beside.incumbent if case.twin is None else None


def _over_champion(case: Case, model: Trained) -> Interval | None:
    """Return the task gain over the registered champion; None where it need not be beaten, or cannot be compared."""
    rival = _rival(case)
    return (
        None
        if rival is None or rival.objection is not None
        else task_gain(case.items[rival.label], case.items[model.label])
    )


def _incumbent(case: Case) -> Values | None:
    """Return the registered champion, with a sentence on what it was held against."""
    known = case.beside.incumbent
    if known is None:
        return None
    if case.twin is not None:
        words = f"The registered champion, version {known.version}, is {case.twin.label} of this run, byte for byte, and need not be beaten."
    elif known.objection is not None:
        words = f"The registered champion, version {known.version}, could not be compared: {known.objection}."
    else:
        gain = task_gain(case.items[BASE], case.items[known.label])
        words = f"The registered champion, version {known.version}, gains {gain.mean:+.3f} nats a token over the base on the same items."
    return {**asdict(known), "label": known.label, "words": words}


def _points(case: Case) -> list[Point]:
    """Place every model that was scored between learning and forgetting, those that are judged first."""
    every = [
        *((case.variant(model), True) for model in case.trained),
        *((variant, False) for variant in case.beside.variants),
    ]
    items = case.items
    return [
        place(
            variant,
            (items[BASE], items[case.base_of(variant)]),
            items[variant.label],
            trained=trained,
        )
        for variant, trained in every
    ]


def _decision(adapters: Mapping[str, Any]) -> Values:
    """Put forward the newest adapter that was not rejected and, of those that pass, the one that learnt most."""
    kept = _with_status(adapters, "pass", "can't tell")
    champion = max(
        _with_status(adapters, "pass"),
        key=lambda label: adapters[label]["total"]["task_gain"]["mean"],
        default=None,
    )
    if champion is not None:
        gain = adapters[champion]["total"]["task_gain"]["mean"]
        reason = (
            f"{champion} passes and gains most on the task ({gain:+.3f} nats a token over the base)"
        )
    else:
        reason = "no adapter passes: " + "; ".join(
            f"{label}: {adapters[label]['verdict']['reason']}" for label in adapters
        )
    return {"candidate": kept[-1] if kept else None, "champion": champion, "decision": reason}


def _with_status(adapters: Mapping[str, Any], *statuses: str) -> list[str]:
    return [label for label, model in adapters.items() if model["verdict"]["status"] in statuses]
