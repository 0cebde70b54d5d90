"""The content of the page's sections as plain values; the templates only render them."""

from collections.abc import Mapping
from typing import Any

import yaml

from pipelines.comparison.comparison import BASE, CONTROL, QUANTIZED_BASE
from pipelines.models.verified import sentence
from pipelines.reporting.formats import is_clear
from pipelines.reporting.report_metrics import ReportMetric, general_change

RECIPE = "recipe.yaml"
"""Name of the recipe among the artifacts of the MLflow run."""
Model = Mapping[str, Any]
Models = Mapping[str, Model]
Summary = Mapping[str, Any]
Row = dict[str, Any]


def against_base(model: Model) -> Any:
    """Return the comparison with the full-precision base; the 4-bit base has no other."""
    return model.get("total", model.get("change", {}))


def verified(summary: Summary, label: str | None = None) -> list[tuple[str, str]]:
    """Return how training and scoring were verified: name and result, of all models or of one."""
    rows = []
    forward = summary.get("forward", {})  # older summaries have none
    for name, checks in forward.items():
        if label not in (None, name):
            continue
        for what, result in checks.items():
            if result is not None:
                text = sentence(result)
                rows.append((f"{name}, {what}", text))
    return rows


def effects(models: Models) -> dict[str, Row]:
    """Return the effects of quantization, of training and of both, for each model but the base."""
    by_quantization = models.get(QUANTIZED_BASE, {}).get("change")
    table = {}
    for label, model in models.items():
        if label == BASE:
            continue
        in_full_precision = label == CONTROL and model["rank"] is None
        quantization = None if in_full_precision else by_quantization
        training = None if label == QUANTIZED_BASE else model["change"]
        table[label] = {
            "quantization": _effect(quantization),
            "training": _effect(training),
            "total": _effect(against_base(model)),
        }
    return table


def _effect(change: Model | None) -> Row | None:
    """Return the change of the task and of general abilities."""
    if change is None:
        return None
    general = general_change({"change": change})
    return {"task_gain": change["task_gain"], "choice_probability": general}


def count_clear_changes(metric: ReportMetric, models: Models) -> tuple[int, int]:
    """Return how many intervals of the trained models exclude zero, and how many there are."""
    intervals = []
    for model in models.values():
        change = metric.change(model)
        if "figures" in model and change is not None:
            intervals.append(change)
    clear = sum(map(is_clear, intervals))
    return clear, len(intervals)


def adapters(models: Models) -> dict[str, Model]:
    """Return the models that the gate judged."""
    return {label: model for label, model in models.items() if "verdict" in model}


def accuracy_text(accuracy: float | None) -> str:
    """Return an accuracy in percent; an lm-eval task may report a score on another scale."""
    if accuracy is None:
        return ""
    if 0 <= accuracy <= 1:
        return f"{100 * accuracy:.1f}\u00a0%"
    return f"{accuracy:.3g}".replace("-", "−")


def undecided(summary: Summary) -> list[str]:
    """Return which adapters the gate cannot decide on, and why, if another adapter passes.

    If none passes, the decision already names them.
    """
    if summary["champion"] is None:
        return []
    remarks = []
    for label, model in adapters(summary["models"]).items():
        verdict = model["verdict"]
        if verdict["status"] == "can't tell":
            remarks.append(f"Can't tell for {label}: {verdict['reason']}.")
    return remarks


def control_rates(summary: Summary) -> list[Row]:
    """Return the learning rates tried for the control, with their losses and outcomes."""
    chosen = summary["control"]["chosen"]
    rows = []
    for rate, loss in summary["control"]["rates"].items():
        outcome = ""
        if loss is None:
            outcome = "diverged"
        elif float(rate) == chosen:
            outcome = "chosen"
        rows.append({"rate": rate, "loss": loss, "outcome": outcome})
    return rows


def power_by_benchmark(model: Model) -> Row:
    """Return the power of each benchmark alone; empty if only their union was analyzed."""
    power = model.get("power") or {}
    return dict(power.get("benchmarks") or {})


def power_table(models: Models) -> dict[str, Row]:
    """Return the power of each adapter, for each benchmark whose power is known."""
    judged = adapters(models)
    table: dict[str, Row] = {}
    for label, model in judged.items():
        for name, power in power_by_benchmark(model).items():
            row = table.setdefault(name, dict.fromkeys(judged))
            row[label] = power
    return table


def training_method(summary: Summary, label: str) -> str:
    """Return how a model was trained, and over which base."""
    recipe = summary["recipe"]
    rank = summary["models"][label]["rank"]
    if label == CONTROL:
        rank = recipe["control"]["rank"]
    if rank is None:
        return "all weights, in full precision"
    method = "DoRA" if recipe["lora"]["use_dora"] else "LoRA"
    base = "NF4" if recipe["base_model"]["quantization"] == "nf4" else "full precision"
    return f"{method} of rank {rank} over {base}"


def commands(summary: Summary) -> list[str]:
    """Return the commands that repeat the comparison from a checkout with the recipe file in it."""
    commit = summary["commit"]
    name = summary["recipe"]["name"]
    lines = []
    if commit not in (None, "unknown"):
        lines.append(f"git checkout {commit.removesuffix('-dirty')}")
    lines += ["make setup", f".venv/bin/lora run {name}.yaml", f".venv/bin/lora compare {name}"]
    return lines


def recipe_text(summary: Summary) -> str:
    """Return the recipe with every setting written out, as a file that can be run."""
    return yaml.safe_dump(summary["recipe"], sort_keys=False, allow_unicode=True, width=100)
