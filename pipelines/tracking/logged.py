"""What MLflow's pages show of each model, as plain names and values: parameters, metrics, curve, tags.

Metrics are grouped by prefix, and what people compare comes first:

    benchmark/…    choice probability on each benchmark, or its accuracy where it has no choices
    cost/…         trained weights, bytes, speed, memory
    general/…      general abilities, and their change
    interval/…     the ends of 95 % intervals
    kl/…           how far the distributions moved, nats per token
    power/…        what the items can tell
    task/…         the task, and what was gained on it
    train/…        curves over the steps
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.comparison.comparison import BASE, CONTROL
from pipelines.reporting.figures import benchmark_figure, general_change
from pipelines.reporting.words import learning_rate
from pipelines.runtime.stage import read_records

Values = dict[str, Any]
CHANGES = {
    "task/gain": ("total", "task_gain"),
    "task/gain_by_training": ("change", "task_gain"),
    "general/change_of_text_loss": ("change", "text_loss"),
    "general/change_of_chat_loss": ("change", "chat_loss"),
}
"""Metric → effect and figure: the total is held against the base in full precision, a change against a model's own base."""
EFFECTS = {"by_training": "change", "in_all": "total"}
"""Name of an effect on MLflow's pages → where a model's entry holds it."""
COSTS = ("trained_weights", "file_bytes", "tokens_per_second", "peak_memory_bytes")
GENERAL = ("choice_probability", "accuracy", "margin", "text_loss", "chat_loss")
POWER = ("items", "needed", "smallest_drop")
LONGEST_NAME = 250
UNFIT = r"[^\w./ -]|(?<![^/])[./]+|[./]+$"
"""What a metric's name may not hold: other signs, and parts that are empty or begin with a point, as of a path."""
CURVES = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes")
"""Figures of a step that a training's run shows; beside them stand the seconds of each phase."""


def parameters(summary: Values, label: str) -> dict[str, str]:
    """Return the few parameters that vary between the models of a comparison.

    Ranks stay numbers, so that a plot puts them in order: the base has rank 0, and a control of all weights none, which
    MLflow's pages draw above all others.
    """
    recipe, rank = summary["recipe"], summary["models"][label].get("rank")
    if label.startswith(BASE):
        known = {"method": "none", "learning_rate": "0", "lora.r": "0", "lora.alpha": "0"}
    else:
        rank = recipe["control"]["rank"] if label == CONTROL else rank
        known = {
            "method": "full" if rank is None else "lora",
            "learning_rate": f"{learning_rate(summary, label):g}",
        }
        known |= (
            {"lora.r": str(rank), "lora.alpha": f"{recipe['lora']['alpha']:g}"}
            if rank is not None
            else {}
        )
    in_full_precision = label == BASE or known["method"] == "full"
    return {
        **known,
        "quantization": "none" if in_full_precision else recipe["base_model"]["quantization"],
    }


def metrics(model: Values) -> dict[str, float]:
    """Return a model's figures by name; what it does not have is left out."""
    found: dict[str, float | None] = _scores(model["scores"])
    changes = {
        name: model.get(effect, {}).get(figure) for name, (effect, figure) in CHANGES.items()
    }
    changes |= {
        "general/change": general_change(model),
        "general/change_in_all": general_change(model, "total"),
    }
    for name, change in changes.items():
        interval = change or {}
        found |= {name: interval.get("mean")}
        found |= {
            f"interval/{name.replace('/', '_')}_{end}": interval.get(end) for end in ("low", "high")
        }
    for name, effect in EFFECTS.items():
        change = model.get(effect, {})
        found |= {f"kl/{name}": change.get("kl")}
        found |= {
            f"interval/kl_{name}_{end}": (change.get("kl_interval") or {}).get(end)
            for end in ("low", "high")
        }
    found |= {f"power/{name}": (model.get("power") or {}).get(name) for name in POWER}
    found |= {f"cost/{name}": model.get("figures", {}).get(name) for name in COSTS}
    return {_allowed(name): float(value) for name, value in found.items() if value is not None}


def curve(model: Values) -> Iterator[tuple[str, float, int, int]]:
    """Yield name, value, time (milliseconds since 1970) and step of each figure of a model's training."""
    return (point for row in training_rows(model) for point in points(row))


def points(row: Values) -> Iterator[tuple[str, float, int, int]]:
    """Yield name, value, time and step of each figure of a row of metrics.jsonl; what an older one lacks is left out."""
    seconds = {f"seconds_{phase}": value for phase, value in row.get("seconds_of", {}).items()}
    for name, value in ({name: row.get(name) for name in CURVES} | seconds).items():
        if value is not None:
            yield f"train/{name}", float(value), int(1000 * row["time"]), row["step"]


def training_time(model: Values) -> tuple[int, int] | None:
    """Return when a model's training began and ended, in milliseconds since 1970; None for what was not trained."""
    rows = training_rows(model)
    return (
        (int(1000 * (rows[0]["time"] - rows[0]["seconds"])), int(1000 * rows[-1]["time"]))
        if rows
        else None
    )


def training_rows(model: Values) -> list[Values]:
    """Return the rows of a model's metrics.jsonl; none for what was not trained."""
    return read_records(Path(model["folder"]) / "metrics.jsonl") if "folder" in model else []


def run_tags(summary: Values, label: str) -> dict[str, str]:
    """Return what a model's own run says beside its figures: an adapter's verdict, and how the control's rate was found."""
    verdict = summary["models"][label].get("verdict")
    judged = {"verdict": verdict["status"], "reason": verdict["reason"]} if verdict else {}
    control = summary["control"]
    found = (
        {"lora.control.rates": json.dumps(control["rates"]), "lora.control.words": control["words"]}
        if label == CONTROL
        else {}
    )
    return {**judged, **found}


def version_tags(summary: Values, label: str) -> dict[str, str]:
    """Return what a consumer wants to know of an adapter without fetching it."""
    model, base = summary["models"][label], summary["base"]
    general = general_change(model)
    values = {
        "adapter_sha256": model["figures"]["adapter_sha256"],
        "rank": model["rank"],
        "file_rank": model["figures"].get(
            "file_rank", model["rank"]
        ),  # what serving has to allow for
        "verdict": model["verdict"]["status"],
        "reason": model["verdict"]["reason"],
        "task_gain": model["total"]["task_gain"]["mean"],
        "general_change": general["mean"] if general else None,
        "base": base["id"],
        "base_revision": base["revision"],
        "quantization": summary["recipe"]["base_model"]["quantization"],
        "data_digest": summary["data"]["digest"],
        "seed": summary["seed"],  # with the group it decides what is held out
        "tokenizer_sha256": base["tokenizer_sha256"],
        "template_sha256": base["template_sha256"],
        "training_stage": model["key"],
        "comparison": summary["key"],
        "commit": summary["commit"],
        **{f"base_fingerprint.{kind}": value for kind, value in base["digests"].items()},
    }
    return {key: str(value)[:5000] for key, value in values.items()}


def _scores(scores: Values) -> dict[str, float | None]:
    task = {"task/loss": scores["task_loss"], "task/perplexity": scores["perplexity"]}
    task |= {f"task/{name}": value for name, value in scores["generation"].items()}
    task |= {f"task/corpus_{name}": value for name, value in scores["corpus"].items()}
    general = {f"general/{name}": scores[name] for name in GENERAL}
    return {
        **task,
        "task/unfinished_answers": scores["unfinished_answers"],
        **general,
        **_by_benchmark(scores["benchmarks"]),
    }


def _by_benchmark(benchmarks: Values) -> dict[str, float | None]:
    return {f"benchmark/{name}": benchmark_figure(one) for name, one in benchmarks.items()}


def _allowed(name: str) -> str:
    """Return a name that every MLflow takes, as a path: a metric of one's own has a colon, a task may have anything."""
    group, _, own = name.partition("/")
    return f"{group}/{re.sub(UNFIT, '_', own)}"[:LONGEST_NAME]
