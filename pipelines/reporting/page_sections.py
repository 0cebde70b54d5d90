"""What the sections of the page show, as plain values taken from the summary; the templates only write them down."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.comparison.comparison import BASE, CONTROL, QUANTIZED_BASE
from pipelines.comparison.records import UNNAMED
from pipelines.models.verified import sentence
from pipelines.reporting.figures import Figure, general_change
from pipelines.reporting.formats import is_clear

SAMPLES = 4
REASONS = 2
"""How many reasons are named of one kind of item that was left out."""
RECIPE = "recipe.yaml"
"""Name under which MLflow keeps the recipe."""
Model = Mapping[str, Any]
Summary = Mapping[str, Any]


def against_base(model: Model) -> Any:
    """Return the comparison with the full-precision base; the base in 4 bits has no other."""
    return model.get("total", model.get("change", {}))


def verified(summary: Summary, label: str | None = None) -> list[tuple[str, str]]:
    """Return what each model, or one, was verified to be in training and in scoring: what was done, and how it agrees."""
    found = summary.get("forward", {})  # summaries of before hold none
    return [
        (f"{name}, {what}", sentence(figures))
        for name, ways in found.items()
        if label in (None, name)
        for what, figures in ways.items()
        if figures is not None
    ]


def effects(models: Mapping[str, Model]) -> dict[str, dict[str, Any]]:
    """Return, for each model but the base, what quantisation, training and both changed of the task and of general abilities."""
    by_quantisation = models.get(QUANTIZED_BASE, {}).get("change")
    return {
        label: {
            "quantisation": None
            if label == CONTROL and model["rank"] is None
            else _two(by_quantisation),
            "training": None if label == QUANTIZED_BASE else _two(model["change"]),
            "total": _two(against_base(model)),
        }
        for label, model in models.items()
        if label != BASE
    }


def _two(change: Model | None) -> dict[str, Any] | None:
    return (
        None
        if change is None
        else {
            "task_gain": change["task_gain"],
            "choice_probability": general_change({"change": change}),
        }
    )


def surely_moved(figure: Figure, models: Mapping[str, Model]) -> tuple[int, int]:
    """Return how many of the trained models' intervals leave zero out, and of how many that have one."""
    found = [
        change
        for model in models.values()
        if "figures" in model and (change := figure.change(model)) is not None
    ]
    return sum(map(is_clear, found)), len(found)


def adapters(models: Mapping[str, Model]) -> dict[str, Model]:
    """Return the models that the gate judged."""
    return {label: model for label, model in models.items() if "verdict" in model}


def share_right(accuracy: float | None) -> str:
    """Return an accuracy in percent; a task that rates itself has a score of its own kind in its place."""
    if accuracy is None:
        return ""
    return (
        f"{100 * accuracy:.1f}\u00a0%"
        if 0 <= accuracy <= 1
        else f"{accuracy:.3g}".replace("-", "−")
    )


def undecided(summary: Summary) -> list[str]:
    """Return of which adapters the gate can't tell, and why, where another passes; where none does the decision says it."""
    if summary["champion"] is None:
        return []
    verdicts = {label: model["verdict"] for label, model in adapters(summary["models"]).items()}
    return [
        f"Can't tell of {label}: {one['reason']}."
        for label, one in verdicts.items()
        if one["status"] == "can't tell"
    ]


def control_rates(summary: Summary) -> list[dict[str, Any]]:
    """Return each rate that was tried for the control, its loss on the examples kept for that, and what came of it."""
    chosen = summary["control"]["chosen"]
    return [
        {
            "rate": rate,
            "loss": loss,
            "outcome": "diverged" if loss is None else "chosen" if float(rate) == chosen else "",
        }
        for rate, loss in summary["control"]["rates"].items()
    ]


def power_by_benchmark(model: Model) -> dict[str, Any]:
    """Return what each benchmark alone can tell of a model; nothing where only all of them were asked."""
    return dict((model.get("power") or {}).get("benchmarks") or {})


def power_table(models: Mapping[str, Model]) -> dict[str, dict[str, Any]]:
    """Return, for each benchmark whose power is known, that of each adapter."""
    found = {label: power_by_benchmark(model) for label, model in adapters(models).items()}
    names = dict.fromkeys(name for one in found.values() for name in one)
    return {name: {label: one.get(name) for label, one in found.items()} for name in names}


def left_out(summary: Summary) -> list[dict[str, Any]]:
    """Return what was left out for all models, by benchmark or kind: how many, and why as their records say it."""
    reasons: dict[str, dict[Any, str]] = {}
    for path in summary["items"].values():
        for record in filter(lambda record: "left_out" in record, _records(Path(path))):
            name = record.get("benchmark") or UNNAMED[record["kind"]]
            reasons.setdefault(name, {})[record["kind"], record["id"]] = record["left_out"]
    counted = {
        name: one["left_out"]
        for name, one in summary["models"][BASE]["scores"]["benchmarks"].items()
        if one["left_out"]
    }
    return [
        {
            "name": name,
            "count": len(found) or counted[name],
            "why": _some(list(dict.fromkeys(found.values()))),
        }
        for name in dict.fromkeys([*counted, *reasons])
        for found in [reasons.get(name, {})]
    ]


def _some(reasons: list[str]) -> str:
    more = len(reasons) - REASONS
    return "; ".join([*reasons[:REASONS], *([f"and {more} more like it"] if more > 0 else [])])


def samples(summary: Summary) -> list[dict[str, Any]]:
    """Return, for the first prompts that every model answered, each model's record."""
    labels = [
        label
        for label in summary["models"]
        if label != QUANTIZED_BASE and label in summary["items"]
    ]
    generated = {label: _generations(Path(summary["items"][label])) for label in labels}
    shared = (
        sorted(set.intersection(*(set(records) for records in generated.values())))
        if generated
        else []
    )
    return [
        {label: records[place] for label, records in generated.items()}
        for place in shared[:SAMPLES]
    ]


def training_method(summary: Summary, label: str) -> str:
    """Return how a model was trained, over what."""
    recipe, rank = summary["recipe"], summary["models"][label]["rank"]
    if label == CONTROL:
        rank = recipe["control"]["rank"]
    if rank is None:
        return "all weights, in full precision"
    over = "NF4" if recipe["base_model"]["quantization"] == "nf4" else "full precision"
    return f"{'DoRA' if recipe['lora']['use_dora'] else 'LoRA'} of rank {rank} over {over}"


def commands(summary: Summary) -> list[str]:
    """Return what repeats the comparison from a checkout of the code, where the recipe is kept under its own name."""
    commit, name = summary["commit"], summary["recipe"]["name"]
    there = [] if commit in (None, "unknown") else [f"git checkout {commit.removesuffix('-dirty')}"]
    return [
        *there,
        "make setup",
        f".venv/bin/lora run {name}.yaml",
        f".venv/bin/lora compare {name}",
    ]


def recipe_text(summary: Summary) -> str:
    """Return the recipe with every setting spelt out, as a file that can be run."""
    return yaml.safe_dump(summary["recipe"], sort_keys=False, allow_unicode=True, width=100)


def _generations(path: Path) -> dict[int, dict[str, Any]]:
    return {
        record["id"]: record
        for record in _records(path)
        if record["kind"] == "generation" and "left_out" not in record
    }


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(
        encoding="utf-8"
    ) as lines:  # not splitlines, which also breaks at separators inside an answer
        yield from map(json.loads, lines)
