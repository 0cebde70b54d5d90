"""The content of the page's sections as plain values; the templates only render them."""

from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from pipelines.comparison.comparison import BASE, CONTROL, QUANTIZED_BASE
from pipelines.comparison.differences import BenchmarkChange
from pipelines.comparison.document import Effect, ModelSummary, Summary
from pipelines.comparison.power import Power
from pipelines.comparison.resampling import Interval
from pipelines.reporting.formats import is_clear
from pipelines.reporting.model_parts import (
    EffectName,
    against_base,
    effect_of,
    judgment_of,
    training_of,
    verified_readers,
)
from pipelines.reporting.report_metrics import MIN_ANSWERS, ReportMetric, general_change_by

RECIPE = "recipe.yaml"
"""Name of the recipe among the artifacts of the MLflow run."""
Models = Mapping[str, ModelSummary]


@dataclass(frozen=True)
class EffectCell:
    """The change of the task or of general abilities by one of the effects."""

    name: str
    """Value of the page's data-figure attribute."""
    change: Interval | None
    """None if the effect does not apply, or was not measured."""


@dataclass(frozen=True)
class TriedRate:
    """A learning rate that was tried for the control."""

    rate: str
    loss: float | None
    """On the tuning examples, nats per supervised token; None if training diverged."""
    outcome: str
    """chosen, diverged, or empty."""


def verified(summary: Summary, label: str | None = None) -> list[tuple[str, str]]:
    """Return how training, scoring and exports were verified: name and result.

    Args:
        summary: of the comparison.
        label: of one model; None for all.
    """
    rows = []
    for name, checks in summary.forward.items():
        if label in (None, name):
            for what, result in verified_readers(checks).items():
                rows.append((f"{name}, {what}", str(result)))
            if checks.served is not None:
                rows.append((f"{name}, exports", str(checks.served)))
    return rows


def compared_ranks(summary: Summary) -> list[int]:
    """Return the ranks of the compared adapters, in the order of the recipe."""
    compared = {training_of(model).rank for model in summary.adapters.values()}
    return [rank for rank in summary.recipe.lora.ranks if rank in compared]


def effects(models: Models) -> dict[str, list[EffectCell]]:
    """Return the effects of quantization, of training and of both, for each model but the base."""
    quantized_base = models.get(QUANTIZED_BASE)
    by_quantization = None if quantized_base is None else quantized_base.change
    table = {}
    for label, model in models.items():
        if label == BASE:
            continue
        in_full_precision = label == CONTROL and training_of(model).rank is None
        separated = {
            "quantization": None if in_full_precision else by_quantization,
            "training": None if label == QUANTIZED_BASE else model.change,
            "total": against_base(model),
        }
        table[label] = _effect_cells(separated)
    return table


def _effect_cells(separated: Mapping[str, Effect | None]) -> list[EffectCell]:
    """Return the changes of the task, then those of general abilities."""
    task = []
    general = []
    for name, effect in separated.items():
        task_gain = None if effect is None else effect.task_gain
        task.append(EffectCell(f"{name}.task_gain", task_gain))
        change = None if effect is None else general_change_by(effect)
        general.append(EffectCell(f"{name}.choice_probability", change))
    return [*task, *general]


def models_with(effect: EffectName, models: Models) -> dict[str, ModelSummary]:
    """Return the base, with which models are compared, and every model with an effect.

    Args:
        effect: by training, or in total.
        models: the entries of the summary, by label.
    """
    found = {}
    for label, model in models.items():
        if label == BASE or effect_of(model, effect) is not None:
            found[label] = model
    return found


def benchmark_change(
    model: ModelSummary, effect: EffectName, benchmark: str
) -> BenchmarkChange | None:
    """Return the change on a benchmark; None without the effect, or if it was not compared.

    Args:
        model: the model's entry in the summary.
        effect: by training, or in total.
        benchmark: name of a benchmark or of a task.
    """
    found = effect_of(model, effect)
    return None if found is None else found.benchmarks.get(benchmark)


def is_clear_change(summary: Summary, metric: ReportMetric, change: Interval) -> bool:
    """Return whether a change excludes zero, and was measured on enough items to say so.

    Args:
        summary: of the comparison.
        metric: that changed.
        change: of one model.
    """
    answers = summary.recipe.evaluation.generations
    return is_clear(change) and not (metric.is_of_answers and answers < MIN_ANSWERS)


def count_clear_changes(summary: Summary, metric: ReportMetric) -> tuple[int, int]:
    """Return how many changes of the trained models are clear, and how many there are."""
    clear = 0
    changes = 0
    for model in summary.models.values():
        change = metric.change(model)
        if model.training is not None and change is not None:
            changes += 1
            clear += is_clear_change(summary, metric, change)
    return clear, changes


def champion_first(summary: Summary, models: Models) -> dict[str, ModelSummary]:
    """Return models with the champion first, then the recommended adapter and the candidate."""
    recommended = summary.recommended.label if summary.recommended else None
    first = [summary.champion, recommended, summary.candidate]
    order = [label for label in first if label is not None and label in models]
    return {label: models[label] for label in dict.fromkeys([*order, *models])}


def common_rules(summary: Summary) -> list[str]:
    """Return the names of the gate's rules that every adapter passes; none for one adapter."""
    adapters = list(summary.adapters.values())
    passed = [
        {rule.name for rule in judgment_of(model).verdict.rules if rule.status == "pass"}
        for model in adapters
    ]
    if len(adapters) < 2:
        return []
    return sorted(set.intersection(*passed))


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
    if summary.champion is None:
        return []
    remarks = []
    for label, model in summary.adapters.items():
        verdict = judgment_of(model).verdict
        if verdict.status == "can't tell":
            remarks.append(f"Can't tell for {label}: {verdict.reason}.")
    return remarks


def control_rates(summary: Summary) -> list[TriedRate]:
    """Return the learning rates tried for the control, with their losses and outcomes."""
    rows = []
    for rate, loss in summary.control.rates.items():
        outcome = ""
        if loss is None:
            outcome = "diverged"
        elif float(rate) == summary.control.chosen:
            outcome = "chosen"
        rows.append(TriedRate(rate, loss, outcome))
    return rows


def power_by_benchmark(model: ModelSummary) -> dict[str, Power]:
    """Return the power of each benchmark alone; empty if nothing could be analyzed."""
    return {} if model.power is None else model.power.benchmarks


def power_table(summary: Summary) -> dict[str, dict[str, Power | None]]:
    """Return the power of each adapter, for each benchmark whose power is known."""
    adapters = summary.adapters
    table: dict[str, dict[str, Power | None]] = {}
    for label, model in adapters.items():
        for name, power in power_by_benchmark(model).items():
            row = table.setdefault(name, dict.fromkeys(adapters))
            row[label] = power
    return table


def training_method(summary: Summary, label: str) -> str:
    """Return how a model was trained, and over which base.

    Args:
        summary: of the comparison.
        label: of a trained model in it.
    """
    recipe = summary.recipe
    rank = training_of(summary.models[label]).rank
    if label == CONTROL:
        rank = recipe.control.rank
    if rank is None:
        return "all weights, in full precision"
    method = "DoRA" if recipe.lora.use_dora else "LoRA"
    base = "NF4" if recipe.base_model.quantization == "nf4" else "full precision"
    return f"{method} of rank {rank} over {base}"


def commands(summary: Summary) -> list[str]:
    """Return the commands that repeat the comparison from a checkout with the recipe file in it."""
    commit = summary.commit
    name = summary.recipe.name
    lines = []
    if commit != "unknown":
        lines.append(f"git checkout {commit.removesuffix('-dirty')}")
    lines += ["make setup", f".venv/bin/lora run {name}.yaml", f".venv/bin/lora compare {name}"]
    return lines


def recipe_text(summary: Summary) -> str:
    """Return the recipe with every setting written out, as a file that can be run."""
    settings = summary.recipe.model_dump(mode="json")
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)
