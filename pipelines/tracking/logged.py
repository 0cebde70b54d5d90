"""What the MLflow pages show of each model, as names and values: parameters, metrics, curve, tags.

Metrics are few, because every one has its own plot; the tables and the report have all of them.
They are grouped by prefix:

    benchmark/…    choice probability on each benchmark, or accuracy if it has no choices
    cost/…         file size, speed, memory
    general/…      general abilities, and their change by training
    task/…         the task, and the gain on it since the base in full precision
    train/…        curves over the steps
    reference/…    all but the curves, of the base and the control

The base and the control have a group of their own, so that they do not stretch the axes on which
the ranks are compared. For the same reason, they have no numeric parameters. A metric that is the
same for every model is left out, and so is a curve that does not change.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.comparison.comparison import BASE, CONTROL
from pipelines.comparison.document import ModelSummary, Summary
from pipelines.comparison.scores import Scores
from pipelines.reporting.model_parts import (
    EffectName,
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
CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second")
"""Curves of a model's run; that of its training has all."""
BYTES_PER_GIB = 2**30
MAX_NAME_LENGTH = 250
INVALID_IN_NAMES = r"[^\w./ -]|(?<![^/])[./]+|[./]+$"
"""Not allowed in a metric name: other characters, and parts that are empty or start with a dot."""
MAX_TAG_LENGTH = 5000
COMPARED_TAG = "compared_champion"
ANY_CHAMPION = "any"
NO_CHAMPION = "none"


@dataclass(frozen=True)
class Parameters:
    """The few parameters that differ between the models of a comparison."""

    method: str
    """none, full or lora."""
    quantization: str
    learning_rate: float | None = None
    """At its peak; None if it is not shown."""
    rank: int | None = None
    """None if it is not shown."""
    alpha: float = 0.0

    def by_name(self) -> dict[str, str]:
        """Return the parameters under the names that the MLflow pages show."""
        shown = {"method": self.method, "quantization": self.quantization}
        if self.learning_rate is not None:
            shown["learning_rate"] = f"{self.learning_rate:g}"
        if self.rank is not None:
            shown |= {"lora.r": str(self.rank), "lora.alpha": f"{self.alpha:g}"}
        return shown


def parameters(summary: Summary, label: str) -> Parameters:
    """Return the parameters of a model: those of a base or a control have no numbers."""
    recipe = summary.recipe
    quantization = recipe.base_model.quantization
    if label.startswith(BASE):
        return Parameters("none", "none" if label == BASE else quantization)
    if label == CONTROL:
        is_full = recipe.control.rank is None
        return Parameters("full", "none") if is_full else Parameters("lora", quantization)
    rank = training_of(summary.models[label]).rank
    rate = peak_rate(summary, label)
    return Parameters("lora", quantization, rate, rank, recipe.lora.alpha)


def peak_rate(summary: Summary, label: str) -> float:
    """Return the peak learning rate of a model; it was trained."""
    rate = learning_rate(summary, label)
    assert rate is not None, "only a base has no learning rate"
    return rate


def metrics(summary: Summary, label: str) -> dict[str, float]:
    """Return a model's metrics by name; one that it does not have is omitted."""
    measured = {one: _measured(model) for one, model in summary.models.items()}
    is_adapter = summary.models[label].judgment is not None
    constant = _constant(measured)
    shown = {}
    for name, value in measured[label].items():
        if name not in constant:
            shown[name if is_adapter else _reference_name(name)] = value
    return shown


def _constant(measured: Mapping[str, Mapping[str, float]]) -> set[str]:
    """Return the metrics that have the same value for all of several models."""
    values = defaultdict(list)
    for model in measured.values():
        for name, value in model.items():
            values[name].append(value)
    return {name for name, found in values.items() if len(found) > 1 and len(set(found)) == 1}


def _reference_name(name: str) -> str:
    group, _, rest = name.partition("/")
    return f"reference/{group}_{rest}"[:MAX_NAME_LENGTH]


def _measured(model: ModelSummary) -> dict[str, float]:
    found = _scores(model.scores) | _changes(model)
    if model.training is not None:
        found |= _costs(model.training.result)
    measured = {}
    for name, value in found.items():
        if value is not None:
            measured[_valid_name(name)] = float(value)
    return measured


def _scores(scores: Scores) -> Numbers:
    values: Numbers = {"task/loss": scores.task_loss}
    if scores.choice_probability is None:
        values["general/accuracy"] = scores.accuracy
    else:
        values["general/choice_probability"] = scores.choice_probability
    for name, value in scores.generation.items():
        values[f"task/{name}"] = value
    for name, benchmark in scores.benchmarks.items():
        values[f"benchmark/{name}"] = benchmark_score(benchmark)
    return values


def _changes(model: ModelSummary) -> Numbers:
    """Return the gain and the general change; their intervals are in the tables."""
    values: Numbers = {}
    general = general_change(model)
    if general is not None:
        values["general/change"] = general.mean
    if model.total is not None:
        values["task/gain"] = model.total.task_gain.mean
    return values


def _costs(trained: TrainResult) -> Numbers:
    return {
        "cost/file_megabytes": trained.saved.file_bytes / 1e6,
        "cost/tokens_per_second": trained.totals.tokens_per_second,
        "cost/peak_memory_gib": trained.peak_memory_bytes / BYTES_PER_GIB,
    }


def curve(model: ModelSummary) -> Iterator[MetricPoint]:
    """Yield the points of the few curves of a model's training that change."""
    points = defaultdict(list)
    for row in training_rows(model):
        for point in row.points(CURVES):
            points[point[0]].append(point)
    for curve_points in points.values():
        values = {value for _, value, _, _ in curve_points}
        if len(values) > 1 or len(curve_points) == 1:
            yield from curve_points


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
        "template_sha256": summary.data.template_sha256,
        "comparison": summary.key,
        "commit": summary.commit,
        COMPARED_TAG: _compared_champion(summary),
    }


def _compared_champion(summary: Summary) -> str:
    """Return the digest of the champion that the adapters were compared with."""
    if summary.recipe.gate.min_gain_over_champion is None:
        return ANY_CHAMPION
    champion = summary.registered_champion
    return NO_CHAMPION if champion is None else champion.adapter_sha256


def _valid_name(name: str) -> str:
    """Return a metric name that every MLflow server accepts.

    The name of a user-defined metric has a colon, and the name of an lm-eval task may have any
    character.
    """
    group, _, rest = name.partition("/")
    rest = re.sub(INVALID_IN_NAMES, "_", rest)
    return f"{group}/{rest}"[:MAX_NAME_LENGTH]
