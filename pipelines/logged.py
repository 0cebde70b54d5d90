"""What MLflow's pages show of each model, as plain names and values: parameters, metrics, curve and tags.

Metrics are grouped by prefix, and what people compare comes first:

    benchmark/…    choice probability on each benchmark
    cost/…         trained weights, bytes, speed, memory
    general/…      general abilities, and their change
    interval/…     the ends of 95 % intervals
    task/…         the task, and what was gained on it
    train/…        curves over the steps
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.stage import read_records

Values = dict[str, Any]
CHANGES = {
    "task/gain": ("total", "task_gain"),
    "task/gain_by_training": ("change", "task_gain"),
    "general/change": ("change", "choice_probability"),
    "general/change_in_all": ("total", "choice_probability"),
}
"""Metric → effect and figure: the total is held against the base in full precision, a change against a model's own base."""
COSTS = ("trained_weights", "file_bytes", "tokens_per_second", "peak_memory_bytes")
CURVES = ("loss", "learning_rate", "grad_norm")


def parameters(summary: Values, label: str) -> dict[str, str]:
    """Return the few parameters that vary between the models of a comparison.

    Ranks stay numbers, so that a plot puts them in order: the base has rank 0, and the control none, which MLflow's
    pages draw above all others.
    """
    recipe, model = summary["recipe"], summary["models"][label]
    quantized = label not in ("base", "control")
    common = {"quantization": recipe["base_model"]["quantization"] if quantized else "none"}
    if label.startswith("base"):
        return {"method": "none", "learning_rate": "0", "lora.r": "0", "lora.alpha": "0", **common}
    if model["rank"] is None:
        return {"method": "full", "learning_rate": f"{recipe['control']['learning_rate']:g}", **common}
    lora = recipe["lora"]
    rates = {"learning_rate": f"{lora['learning_rate']:g}", "lora.alpha": f"{lora['alpha']:g}"}
    return {"method": "lora", "lora.r": str(model["rank"]), **rates, **common}


def metrics(model: Values) -> dict[str, float]:
    """Return a model's figures by name; what it does not have is left out."""
    found: dict[str, float | None] = {**_scores(model["scores"])}
    for name, (effect, figure) in CHANGES.items():
        interval = model.get(effect, {}).get(figure, {})
        found |= {name: interval.get("mean")}
        found |= {f"interval/{name.replace('/', '_')}_{end}": interval.get(end) for end in ("low", "high")}
    found |= {f"cost/{name}": model.get("figures", {}).get(name) for name in COSTS}
    return {name: float(value) for name, value in found.items() if value is not None}


def curve(model: Values) -> Iterator[tuple[str, float, int, int]]:
    """Yield name, value, time (milliseconds since 1970) and step of each figure of a model's training."""
    for row in training_rows(model):
        for name in CURVES:
            if row[name] is not None:
                yield f"train/{name}", float(row[name]), int(1000 * row["time"]), row["step"]


def training_time(model: Values) -> tuple[int, int] | None:
    """Return when a model's training began and ended, in milliseconds since 1970; None for what was not trained."""
    rows = training_rows(model)
    return (int(1000 * (rows[0]["time"] - rows[0]["seconds"])), int(1000 * rows[-1]["time"])) if rows else None


def training_rows(model: Values) -> list[Values]:
    """Return the rows of a model's metrics.jsonl; none for what was not trained."""
    return read_records(Path(model["folder"]) / "metrics.jsonl") if "folder" in model else []


def version_tags(summary: Values, label: str) -> dict[str, str]:
    """Return what a consumer wants to know of an adapter without fetching it."""
    model, base = summary["models"][label], summary["base"]
    values = {
        "adapter_sha256": model["figures"]["adapter_sha256"],
        "rank": model["rank"],
        "file_rank": model["figures"].get("file_rank", model["rank"]),  # what serving has to allow for
        "verdict": model["verdict"]["status"],
        "reason": model["verdict"]["reason"],
        "task_gain": model["total"]["task_gain"]["mean"],
        "general_change": model["change"]["choice_probability"]["mean"],
        "base": base["id"],
        "base_revision": base["revision"],
        "quantization": summary["recipe"]["base_model"]["quantization"],
        "data_digest": summary["data"]["digest"],
        "tokenizer_sha256": base["tokenizer_sha256"],
        "template_sha256": base["template_sha256"],
        "training_stage": model["key"],
        "comparison": summary["key"],
        "commit": summary["commit"],
        **{f"base_fingerprint.{kind}": value for kind, value in base["digests"].items()},
    }
    return {key: str(value)[:5000] for key, value in values.items()}


def _scores(scores: Values) -> dict[str, float | None]:
    task = {"task/loss": scores["task_loss"], "task/chrf": scores["chrf"], "task/rouge_l": scores["rouge_l"]}
    general = {f"general/{name}": scores[name] for name in ("choice_probability", "accuracy", "margin")}
    return {**task, **general, **{f"benchmark/{name}": one["choice_probability"] for name, one in scores["benchmarks"].items()}}
