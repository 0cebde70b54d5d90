"""What the MLflow pages show of each model, as names and values: parameters, metrics, curve, tags.

Metrics are grouped by prefix:

    benchmark/…    choice probability on each benchmark, or accuracy if it has no choices
    cost/…         trained weights, bytes, speed, memory
    general/…      general abilities, and their change
    interval/…     the ends of 95 % intervals
    kl/…           how far the distributions moved, nats per token
    power/…        statistical power of the items
    task/…         the task, and the gain on it
    train/…        curves over the steps
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.comparison.comparison import BASE, CONTROL
from pipelines.comparison.document import ModelSummary, Summary
from pipelines.comparison.power import Power
from pipelines.comparison.resampling import Interval
from pipelines.comparison.scores import Scores
from pipelines.reporting.model_parts import (
    EffectName,
    effect_of,
    judgment_of,
    total_of,
    training_of,
)
from pipelines.reporting.report_metrics import benchmark_score, general_change
from pipelines.reporting.words import learning_rate
from pipelines.runtime.interfaces.results import TrainResult
from pipelines.runtime.stage import read_records
from pipelines.tracking.step_metrics import MetricPoint, StepMetrics
from pipelines.tracking.task_identity import task_tags

Numbers = dict[str, float | None]
Tags = dict[str, str]
EFFECTS: Mapping[str, EffectName] = {"by_training": "change", "in_all": "total"}
"""Name of an effect on the MLflow pages → its name in a summary.

A total is relative to the base in full precision, a change to the base the model was trained on.
"""
MAX_NAME_LENGTH = 250
INVALID_IN_NAMES = r"[^\w./ -]|(?<![^/])[./]+|[./]+$"
"""Not allowed in a metric name: other characters, and parts that are empty or start with a dot."""
MAX_TAG_LENGTH = 5000


@dataclass(frozen=True)
class Parameters:
    """The few parameters that differ between the models of a comparison.

    Ranks are numbers, so that a plot can order them. The base has rank 0. A control that trains all
    weights has no rank, and MLflow's pages draw it above all others.
    """

    method: str
    """none, full or lora."""
    learning_rate: float
    """At its peak; 0 for a base."""
    quantization: str
    rank: int | None = None
    """None for full fine-tuning."""
    alpha: float = 0.0

    def by_name(self) -> dict[str, str]:
        """Return the parameters under the names that the MLflow pages show."""
        shown = {
            "method": self.method,
            "learning_rate": f"{self.learning_rate:g}",
            "quantization": self.quantization,
        }
        if self.rank is not None:
            shown |= {"lora.r": str(self.rank), "lora.alpha": f"{self.alpha:g}"}
        return shown


def parameters(summary: Summary, label: str) -> Parameters:
    """Return the parameters of a model."""
    recipe = summary.recipe
    quantization = recipe.base_model.quantization
    if label.startswith(BASE):
        return Parameters("none", 0.0, "none" if label == BASE else quantization, rank=0)
    rate = peak_rate(summary, label)
    rank = training_of(summary.models[label]).rank
    if label == CONTROL:
        rank = recipe.control.rank
    if rank is None:
        return Parameters("full", rate, "none")
    return Parameters("lora", rate, quantization, rank, recipe.lora.alpha)


def peak_rate(summary: Summary, label: str) -> float:
    """Return the peak learning rate of a model; it was trained."""
    rate = learning_rate(summary, label)
    assert rate is not None, "only a base has no learning rate"
    return rate


def metrics(model: ModelSummary) -> dict[str, float]:
    """Return a model's metrics by name; a metric that the model does not have is omitted."""
    found = _scores(model.scores)
    found |= _changes(model)
    found |= _divergences(model)
    if model.power is not None:
        found |= _power(model.power)
    if model.training is not None:
        found |= _costs(model.training.result)
    measured = {}
    for name, value in found.items():
        if value is not None:
            measured[_valid_name(name)] = float(value)
    return measured


def _scores(scores: Scores) -> Numbers:
    values: Numbers = {
        "task/loss": scores.task_loss,
        "task/perplexity": scores.perplexity,
        "task/unfinished_answers": scores.unfinished_answers,
        "general/choice_probability": scores.choice_probability,
        "general/accuracy": scores.accuracy,
        "general/margin": scores.margin,
        "general/text_loss": scores.text_loss,
        "general/chat_loss": scores.chat_loss,
    }
    for name, value in scores.generation.items():
        values[f"task/{name}"] = value
    for name, value in scores.corpus.items():
        values[f"task/corpus_{name}"] = value
    for name, benchmark in scores.benchmarks.items():
        values[f"benchmark/{name}"] = benchmark_score(benchmark)
    return values


def _changes(model: ModelSummary) -> Numbers:
    """Return the mean and the ends of every change."""
    changes = {
        "general/change": general_change(model),
        "general/change_in_all": general_change(model, "total"),
    }
    if model.total is not None:
        changes |= {"task/gain": model.total.task_gain}
    if model.change is not None:
        changes |= {
            "task/gain_by_training": model.change.task_gain,
            "general/change_of_text_loss": model.change.text_loss,
            "general/change_of_chat_loss": model.change.chat_loss,
        }
    values: Numbers = {}
    for name, interval in changes.items():
        if interval is not None:
            values[name] = interval.mean
            values |= _interval_ends(name.replace("/", "_"), interval)
    return values


def _divergences(model: ModelSummary) -> Numbers:
    values: Numbers = {}
    for name, effect in EFFECTS.items():
        change = effect_of(model, effect)
        if change is None:
            continue
        values[f"kl/{name}"] = change.kl
        if change.kl_interval is not None:
            values |= _interval_ends(f"kl_{name}", change.kl_interval)
    return values


def _interval_ends(name: str, interval: Interval) -> Numbers:
    return {f"interval/{name}_low": interval.low, f"interval/{name}_high": interval.high}


def _power(power: Power) -> Numbers:
    return {
        "power/items": power.items,
        "power/needed": power.needed,
        "power/smallest_drop": power.smallest_drop,
    }


def _costs(trained: TrainResult) -> Numbers:
    return {
        "cost/trained_weights": trained.facts.trained_weights,
        "cost/file_bytes": trained.saved.file_bytes,
        "cost/tokens_per_second": trained.totals.tokens_per_second,
        "cost/peak_memory_bytes": trained.peak_memory_bytes,
    }


def curve(model: ModelSummary) -> Iterator[MetricPoint]:
    """Yield every point of the curves of a model's training."""
    for row in training_rows(model):
        yield from row.points()


def training_time(model: ModelSummary) -> tuple[int, int] | None:
    """Return start and end of a training in milliseconds since 1970; None if not trained."""
    rows = training_rows(model)
    if not rows:
        return None
    start = rows[0].time - rows[0].seconds
    end = rows[-1].time
    return int(1000 * start), int(1000 * end)


def training_rows(model: ModelSummary) -> list[StepMetrics]:
    """Return the rows of a model's metrics.jsonl; empty if the model was not trained."""
    if model.training is None:
        return []
    rows = read_records(Path(model.training.folder) / "metrics.jsonl")
    return [StepMetrics.model_validate(row) for row in rows]


def run_tags(summary: Summary, label: str) -> Tags:
    """Return the tags of a model's run: an adapter's verdict, the control's rate search."""
    tags: Tags = {}
    judgment = summary.models[label].judgment
    if judgment is not None:
        tags = {"verdict": judgment.verdict.status, "reason": judgment.verdict.reason}
    if label == CONTROL:
        tags |= {
            "lora.control.rates": json.dumps(summary.control.rates),
            "lora.control.words": summary.control.words,
        }
    return tags


def version_tags(summary: Summary, label: str) -> Tags:
    """Return what a user needs to know about an adapter before downloading it."""
    values = _adapter_facts(summary.models[label]) | _origin(summary)
    values |= task_tags(summary.recipe)
    for kind, digest in summary.base.digests.items():
        values[f"base_fingerprint.{kind}"] = digest
    return {key: str(value)[:MAX_TAG_LENGTH] for key, value in values.items()}


def _adapter_facts(model: ModelSummary) -> dict[str, object]:
    training = training_of(model)
    verdict = judgment_of(model).verdict
    general = general_change(model)
    return {
        "adapter_sha256": training.result.saved.adapter_sha256,
        "rank": training.rank,
        "file_rank": training.result.saved.file_rank,  # the rank that a server must allow
        "verdict": verdict.status,
        "reason": verdict.reason,
        "task_gain": total_of(model).task_gain.mean,
        "general_change": None if general is None else general.mean,
        "training_stage": training.key,
    }


def _origin(summary: Summary) -> dict[str, object]:
    """Return the base, the data and the comparison of all adapters."""
    return {
        "base": summary.base.id,
        "base_revision": summary.base.revision,
        "quantization": summary.recipe.base_model.quantization,
        "data_digest": summary.data.digest,
        "seed": summary.seed,  # determines the held-out examples, together with the group
        "tokenizer_sha256": summary.base.tokenizer_sha256,
        "template_sha256": summary.base.template_sha256,
        "comparison": summary.key,
        "commit": summary.commit,
    }


def _valid_name(name: str) -> str:
    """Return a metric name that every MLflow server accepts.

    The name of a user-defined metric has a colon, and the name of an lm-eval task may have any
    character.
    """
    group, _, rest = name.partition("/")
    rest = re.sub(INVALID_IN_NAMES, "_", rest)
    return f"{group}/{rest}"[:MAX_NAME_LENGTH]
