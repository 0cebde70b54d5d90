"""The report's tables on the MLflow pages, by file name: columns, and rows of data.

comparison      each metric of each model, and how training and quantization changed it
benchmarks      each benchmark of each model
rules           each adapter's result on each rule of the gate
power           the statistical power of the items, of all benchmarks and of each
frontier        every scored model; snapshots and the like are not runs, to keep the run list short
provenance      what was trained on which data, and for how long
control_rates   the learning rates that were tried for the control
spectra         rank, effective rank and largest singular values of each update
"""

from collections.abc import Mapping
from typing import Any

from pipelines.reporting import page_sections
from pipelines.reporting.report_metrics import ReportMetric, report_metrics
from pipelines.reporting.words import learning_rate
from pipelines.tracking.logged import EFFECTS

Values = dict[str, Any]
Rows = list[Values]
Interval = Mapping[str, float]
INTERVAL = ("mean", "low", "high")
POINT = ("label", "method", "rank", "step", "learning_rate", "cut_from", "trained")
POWER = ("items", "needed", "smallest_drop", "enough")
TRAINING = (
    "steps",
    "tokens",
    "supervised_tokens",
    "first_loss",
    "last_loss",
    "training_seconds",
    "adapter_sha256",
)
MAX_SINGULAR_VALUES = 4
"""How many of the largest singular values of each update are listed."""


def tables(summary: Values) -> dict[str, Values]:
    """Return the tables by file name, in the format of MLflow's pages."""
    models = summary["models"]
    rows_by_name = {
        "comparison": _comparison(models),
        "benchmarks": _benchmarks(models),
        "rules": _rules(models),
        "power": _power(models),
        "frontier": [_point(row) for row in summary["frontier"]],
        "provenance": _provenance(summary),
        "control_rates": page_sections.control_rates(summary),
        "spectra": _spectra(summary["spectrum"]),
    }
    return {f"{name}.json": _table(rows) for name, rows in rows_by_name.items() if rows}


def _table(rows: Rows) -> Values:
    names: dict[str, None] = {}  # an ordered set
    for row in rows:
        names |= dict.fromkeys(row)
    columns = list(names)
    data = []
    for row in rows:
        data.append([row.get(name) for name in columns])
    return {"columns": columns, "data": data}


def _comparison(models: Values) -> Rows:
    """Return a row for each model and metric."""
    metrics = report_metrics(models)
    rows = []
    for label, model in models.items():
        for metric in metrics:
            rows.append(_metric_row(label, model, metric))
    return rows


def _metric_row(label: str, model: Values, metric: ReportMetric) -> Values:
    interval = metric.interval(model) or {}
    row = {
        "model": label,
        "figure": metric.name,
        "unit": metric.unit,
        "value": metric.value(model),
        "value_low": interval.get("low"),
        "value_high": interval.get("high"),
    }
    for name, effect in EFFECTS.items():
        row |= _prefixed(name, metric.change(model, effect))
    row["verdict"] = model.get("verdict", {}).get("status")
    return row


def _benchmarks(models: Values) -> Rows:
    """Return a row for each model, benchmark and effect; base-nf4 changes by quantization."""
    rows = []
    for label, model in models.items():
        for name, own in model["scores"]["benchmarks"].items():
            for shown, effect in EFFECTS.items():
                change = model.get(effect, {}).get("benchmarks", {}).get(name)
                if not change:
                    continue
                row = {"model": label, "benchmark": name, "effect": shown, **_ends(change)}
                row["p_value"] = change.get("p_value")
                row["adjusted_p"] = change.get("adjusted_p")
                rows.append(row | own)
    return rows


def _rules(models: Values) -> Rows:
    """Return a row for each adapter and rule, with the resulting verdict."""
    rows = []
    for label, model in page_sections.adapters(models).items():
        verdict = model["verdict"]
        for rule in verdict["rules"]:
            rows.append(
                {
                    "model": label,
                    "rule": rule["name"],
                    "status": rule["status"],
                    "reason": rule["reason"],
                    "verdict": verdict["status"],
                }
            )
    return rows


def _power(models: Values) -> Rows:
    """Return a row for each adapter on all benchmarks, and on each benchmark if it is known."""
    rows = []
    for label, model in page_sections.adapters(models).items():
        powers = {"all": model["power"], **page_sections.power_by_benchmark(model)}
        for name, power in powers.items():
            if power is None:
                continue
            row = {"model": label, "benchmark": name}
            for key in POWER:
                row[key] = power.get(key)
            rows.append(row)
    return rows


def _point(row: Values) -> Values:
    point = {name: row[name] for name in POINT}
    point |= _prefixed("gain", row["gain"])
    point |= _prefixed("general", row["general"])
    return point


def _provenance(summary: Values) -> Rows:
    """Return a row for each trained model."""
    shared = {
        "base": summary["base"]["id"],
        "base_revision": summary["base"]["revision"],
        "data": summary["recipe"]["data"]["source"],
        "data_digest": summary["data"]["digest"],
        "commit": summary["commit"],
        "machine": summary["machine"],
    }
    rows = []
    for label, model in summary["models"].items():
        if "figures" not in model:
            continue
        row = {
            "model": label,
            "trained": page_sections.training_method(summary, label),
            "learning_rate": learning_rate(summary, label),
        }
        for name in TRAINING:
            row[name] = model["figures"].get(name)
        rows.append(row | shared)
    return rows


def _spectra(spectrum: Mapping[str, Any]) -> Rows:
    """Return a row for each adapter and module."""
    rows = []
    for label, modules in spectrum.items():
        for module in modules:
            row = {"model": label}
            for name in ("module", "rank", "effective_rank"):
                row[name] = module[name]
            largest = module["values"][:MAX_SINGULAR_VALUES]
            for index, value in enumerate(largest, start=1):
                row[f"singular_value_{index}"] = value
            rows.append(row)
    return rows


def _prefixed(prefix: str, interval: Interval | None) -> Values:
    return {f"{prefix}_{end}": value for end, value in _ends(interval).items()}


def _ends(interval: Interval | None) -> Values:
    """Return mean, low and high; each is None without an interval."""
    if interval is None:
        return dict.fromkeys(INTERVAL)
    return {end: interval[end] for end in INTERVAL}
