"""The summary of a run: every model's figures, every adapter's verdict, and which adapter is put forward.

A pure function from stage results and item records to the plain values of summary.json; reports and the registry
read nothing else.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.judging.forgetting import Records, change, decide, drop_beyond_control, gain_share, scores
from pipelines.recipe import Recipe

BASE, QUANTIZED_BASE, CONTROL = "base", "base-nf4", "control"


@dataclass(frozen=True)
class Trained:
    """One trained model."""

    label: str
    """control, or rank-R."""
    rank: int | None
    """None for the control."""
    key: str
    """Its training stage's key."""
    folder: str
    """Its training stage's folder."""
    figures: Mapping[str, Any]
    """What training reported."""


def compare(recipe: Recipe, trained: list[Trained], items: Mapping[str, Records]) -> dict[str, Any]:
    """Return the figures of the base, the control and each adapter, and the decision.

    Args:
        recipe: its gate and quantisation are read.
        trained: the control and the adapters, in the order of the report.
        items: label → item records, for the base, the base in 4 bits (where adapters train over it) and each trained model.
    """
    own_base = QUANTIZED_BASE if QUANTIZED_BASE in items else BASE
    models: dict[str, Any] = {label: {"scores": asdict(scores(items[label]))} for label in (BASE, QUANTIZED_BASE) if label in items}
    if own_base == QUANTIZED_BASE:
        models[QUANTIZED_BASE]["change"] = asdict(change(items[BASE], items[QUANTIZED_BASE]))
    for model in trained:
        before = items[BASE] if model.rank is None else items[own_base]
        models[model.label] = {
            **asdict(model),
            "scores": asdict(scores(items[model.label])),
            "change": asdict(change(before, items[model.label])),
            "total": asdict(change(items[BASE], items[model.label])),
        }
        if model.rank is not None:
            models[model.label].update(_judge(recipe, items, own_base, model.label))
    return {"models": models, **_decision(models)}


def _judge(recipe: Recipe, items: Mapping[str, Records], own_base: str, label: str) -> dict[str, Any]:
    share = gain_share(items[BASE], items[CONTROL], items[label])
    beyond = drop_beyond_control((items[BASE], items[own_base]), items[CONTROL], items[label])
    general = change(items[own_base], items[label]).choice_probability
    verdict = decide(share, general, beyond, recipe.gate.model_dump())
    return {"gain_share": asdict(share) if share is not None else None, "beyond_control": asdict(beyond), "verdict": asdict(verdict)}


def _decision(models: Mapping[str, Any]) -> dict[str, Any]:
    """Put forward the newest adapter that was not rejected and, of those that pass, the one that learnt most."""
    adapters = {label: model for label, model in models.items() if model.get("rank") is not None}
    kept = [label for label, model in adapters.items() if model["verdict"]["status"] != "reject"]
    passed = [label for label in kept if adapters[label]["verdict"]["status"] == "pass"]
    champion = max(passed, key=lambda label: adapters[label]["total"]["task_gain"]["mean"], default=None)
    if champion is not None:
        gain = adapters[champion]["total"]["task_gain"]["mean"]
        reason = f"{champion} passes and gains most on the task ({gain:+.3f} nats a token over the base)"
    else:
        reason = "no adapter passes: " + "; ".join(f"{label}: {adapters[label]['verdict']['reason']}" for label in adapters)
    return {"candidate": kept[-1] if kept else None, "champion": champion, "decision": reason}
