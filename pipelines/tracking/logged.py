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
from pathlib import Path
from typing import Any

from pipelines.comparison.comparison import BASE, CONTROL
from pipelines.reporting.report_metrics import benchmark_score, general_change
from pipelines.reporting.words import learning_rate
from pipelines.runtime.stage import read_records

Values = dict[str, Any]
Numbers = dict[str, float | None]
Tags = dict[str, str]
MetricPoint = tuple[str, float, int, int]
"""A metric's name, value, time (milliseconds since 1970) and step."""
CHANGES = {
    "task/gain": ("total", "task_gain"),
    "task/gain_by_training": ("change", "task_gain"),
    "general/change_of_text_loss": ("change", "text_loss"),
    "general/change_of_chat_loss": ("change", "chat_loss"),
}
"""Metric → effect and key.

A total is relative to the base in full precision, a change to the base the model was trained on.
"""
EFFECTS = {"by_training": "change", "in_all": "total"}
"""Name of an effect on the MLflow pages → its key in a model's entry."""
COSTS = ("trained_weights", "file_bytes", "tokens_per_second", "peak_memory_bytes")
GENERAL = ("choice_probability", "accuracy", "margin", "text_loss", "chat_loss")
POWER = ("items", "needed", "smallest_drop")
MAX_NAME_LENGTH = 250
INVALID_IN_NAMES = r"[^\w./ -]|(?<![^/])[./]+|[./]+$"
"""Not allowed in a metric name: other characters, and parts that are empty or start with a dot."""
CURVES = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes")
"""Metrics of a step that a training run shows, in addition to the seconds of each phase."""
MAX_TAG_LENGTH = 5000


def parameters(summary: Values, label: str) -> Tags:
    """Return the few parameters that differ between the models of a comparison.

    Ranks are numbers, so that a plot can order them. The base has rank 0. A control that trains all
    weights has no rank, and MLflow's pages draw it above all others.
    """
    recipe = summary["recipe"]
    if label.startswith(BASE):
        known = {"method": "none", "learning_rate": "0", "lora.r": "0", "lora.alpha": "0"}
    else:
        rank = summary["models"][label].get("rank")
        if label == CONTROL:
            rank = recipe["control"]["rank"]
        known = {
            "method": "full" if rank is None else "lora",
            "learning_rate": f"{learning_rate(summary, label):g}",
        }
        if rank is not None:
            alpha = recipe["lora"]["alpha"]
            known |= {"lora.r": str(rank), "lora.alpha": f"{alpha:g}"}
    in_full_precision = label == BASE or known["method"] == "full"
    quantization = "none" if in_full_precision else recipe["base_model"]["quantization"]
    return known | {"quantization": quantization}


def metrics(model: Values) -> dict[str, float]:
    """Return a model's metrics by name; a metric that the model does not have is omitted."""
    found = _scores(model["scores"])
    found |= _changes(model)
    found |= _divergences(model)
    power = model.get("power") or {}
    costs = model.get("figures", {})
    for name in POWER:
        found[f"power/{name}"] = power.get(name)
    for name in COSTS:
        found[f"cost/{name}"] = costs.get(name)
    measured = {}
    for name, value in found.items():
        if value is not None:
            measured[_valid_name(name)] = float(value)
    return measured


def _scores(scores: Values) -> Numbers:
    values = {"task/loss": scores["task_loss"], "task/perplexity": scores["perplexity"]}
    for name, value in scores["generation"].items():
        values[f"task/{name}"] = value
    for name, value in scores["corpus"].items():
        values[f"task/corpus_{name}"] = value
    values["task/unfinished_answers"] = scores["unfinished_answers"]
    for name in GENERAL:
        values[f"general/{name}"] = scores[name]
    for name, benchmark in scores["benchmarks"].items():
        values[f"benchmark/{name}"] = benchmark_score(benchmark)
    return values


def _changes(model: Values) -> Numbers:
    """Return the mean and the ends of every change."""
    changes = {
        "general/change": general_change(model),
        "general/change_in_all": general_change(model, "total"),
    }
    for name, (effect, key) in CHANGES.items():
        changes[name] = model.get(effect, {}).get(key)
    values: Numbers = {}
    for name, change in changes.items():
        interval = change or {}
        values[name] = interval.get("mean")
        values |= _interval_ends(name.replace("/", "_"), interval)
    return values


def _divergences(model: Values) -> Numbers:
    values: Numbers = {}
    for name, effect in EFFECTS.items():
        change = model.get(effect, {})
        values[f"kl/{name}"] = change.get("kl")
        values |= _interval_ends(f"kl_{name}", change.get("kl_interval") or {})
    return values


def _interval_ends(name: str, interval: Mapping[str, float]) -> Numbers:
    return {
        f"interval/{name}_low": interval.get("low"),
        f"interval/{name}_high": interval.get("high"),
    }


def curve(model: Values) -> Iterator[MetricPoint]:
    """Yield every point of the curves of a model's training."""
    for row in training_rows(model):
        yield from points(row)


def points(row: Values) -> Iterator[MetricPoint]:
    """Yield the points of a row of metrics.jsonl; what an older row lacks is skipped."""
    values = {name: row.get(name) for name in CURVES}
    for phase, seconds in row.get("seconds_of", {}).items():
        values[f"seconds_{phase}"] = seconds
    milliseconds = int(1000 * row["time"])
    for name, value in values.items():
        if value is not None:
            yield f"train/{name}", float(value), milliseconds, row["step"]


def training_time(model: Values) -> tuple[int, int] | None:
    """Return start and end of a training in milliseconds since 1970; None if not trained."""
    rows = training_rows(model)
    if not rows:
        return None
    start = rows[0]["time"] - rows[0]["seconds"]
    end = rows[-1]["time"]
    return int(1000 * start), int(1000 * end)


def training_rows(model: Values) -> list[Values]:
    """Return the rows of a model's metrics.jsonl; empty if the model was not trained."""
    if "folder" not in model:
        return []
    return read_records(Path(model["folder"]) / "metrics.jsonl")


def run_tags(summary: Values, label: str) -> Tags:
    """Return the tags of a model's run: an adapter's verdict, the control's rate search."""
    tags = {}
    verdict = summary["models"][label].get("verdict")
    if verdict:
        tags = {"verdict": verdict["status"], "reason": verdict["reason"]}
    if label == CONTROL:
        control = summary["control"]
        tags["lora.control.rates"] = json.dumps(control["rates"])
        tags["lora.control.words"] = control["words"]
    return tags


def version_tags(summary: Values, label: str) -> Tags:
    """Return what a user needs to know about an adapter before downloading it."""
    model = summary["models"][label]
    base = summary["base"]
    trained = model["figures"]
    general = general_change(model)
    values = {
        "adapter_sha256": trained["adapter_sha256"],
        "rank": model["rank"],
        "file_rank": trained.get("file_rank", model["rank"]),  # the rank that a server must allow
        "verdict": model["verdict"]["status"],
        "reason": model["verdict"]["reason"],
        "task_gain": model["total"]["task_gain"]["mean"],
        "general_change": general["mean"] if general else None,
        "base": base["id"],
        "base_revision": base["revision"],
        "quantization": summary["recipe"]["base_model"]["quantization"],
        "data_digest": summary["data"]["digest"],
        "seed": summary["seed"],  # determines the held-out examples, together with the group
        "tokenizer_sha256": base["tokenizer_sha256"],
        "template_sha256": base["template_sha256"],
        "training_stage": model["key"],
        "comparison": summary["key"],
        "commit": summary["commit"],
    }
    for kind, digest in base["digests"].items():
        values[f"base_fingerprint.{kind}"] = digest
    tags = {}
    for key, value in values.items():
        tags[key] = str(value)[:MAX_TAG_LENGTH]
    return tags


def _valid_name(name: str) -> str:
    """Return a metric name that every MLflow server accepts.

    The name of a user-defined metric has a colon, and the name of an lm-eval task may have any
    character.
    """
    group, _, rest = name.partition("/")
    rest = re.sub(INVALID_IN_NAMES, "_", rest)
    return f"{group}/{rest}"[:MAX_NAME_LENGTH]
