"""The tables of the report on MLflow's pages, by file name: columns, and rows of data.

comparison      each figure of each model, and how training and quantisation changed it
benchmarks      each benchmark of each model
rules           how each adapter stands to each rule of the gate
power           what the items can tell, of all benchmarks and of each
frontier        every model that was scored, those that are no run too: they would crowd the page where models are compared
provenance      what was trained on what, for how long
control_rates   the rates that were tried for the control
spectra         of each update its rank, its effective rank and its largest singular values
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.reporting import page_sections
from pipelines.reporting.figures import figures
from pipelines.reporting.words import learning_rate
from pipelines.tracking.logged import EFFECTS

Values = dict[str, Any]
Rows = list[Values]
INTERVAL = ("mean", "low", "high")
POINT = ("label", "method", "rank", "step", "learning_rate", "cut_from", "trained")
TRAINED = (
    "steps",
    "tokens",
    "supervised_tokens",
    "first_loss",
    "last_loss",
    "training_seconds",
    "adapter_sha256",
)
LARGEST = 4
"""Singular values of each update that are listed."""


def tables(summary: Values) -> dict[str, Values]:
    """Return the tables by file name, in the form that MLflow's pages show."""
    models = summary["models"]
    found = {
        "comparison": _comparison(models),
        "benchmarks": _benchmarks(models),
        "rules": _rules(models),
        "power": list(_power(models)),
        "frontier": [_point(row) for row in summary["frontier"]],
        "provenance": _provenance(summary),
        "control_rates": page_sections.control_rates(summary),
        "spectra": _spectra(summary["spectrum"]),
    }
    return {f"{name}.json": _table(rows) for name, rows in found.items() if rows}


def _table(rows: Rows) -> Values:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}


def _comparison(models: Values) -> Rows:
    """Return a row for each model and figure."""
    return [
        {
            "model": label,
            "figure": figure.name,
            "unit": figure.unit,
            "value": figure.level(model),
            **{f"value_{end}": (figure.spread(model) or {}).get(end) for end in ("low", "high")},
            **{
                f"{name}_{end}": value
                for name, effect in EFFECTS.items()
                for end, value in _ends(figure.change(model, effect)).items()
            },
            "verdict": model.get("verdict", {}).get("status"),
        }
        for label, model in models.items()
        for figure in figures(models)
    ]


def _benchmarks(models: Values) -> Rows:
    """Return a row for each model, benchmark and effect; of base-nf4 the change is that by quantisation."""
    return [
        {
            "model": label,
            "benchmark": name,
            "effect": shown,
            **_ends(change),
            **{key: change.get(key) for key in ("p_value", "adjusted_p")},
            **own,
        }
        for label, model in models.items()
        for name, own in model["scores"]["benchmarks"].items()
        for shown, effect in EFFECTS.items()
        if (change := model.get(effect, {}).get("benchmarks", {}).get(name))
    ]


def _rules(models: Values) -> Rows:
    """Return a row for each adapter and rule, with the verdict that they come to."""
    return [
        {
            "model": label,
            "rule": rule["name"],
            "status": rule["status"],
            "reason": rule["reason"],
            "verdict": model["verdict"]["status"],
        }
        for label, model in page_sections.adapters(models).items()
        for rule in model["verdict"]["rules"]
    ]


def _power(models: Values) -> Iterator[Values]:
    """Yield a row for each adapter on all benchmarks, and where it is known on each."""
    for label, model in page_sections.adapters(models).items():
        for name, power in {
            "all": model["power"],
            **page_sections.power_by_benchmark(model),
        }.items():
            if power is not None:
                yield {
                    "model": label,
                    "benchmark": name,
                    **{
                        key: power.get(key)
                        for key in ("items", "needed", "smallest_drop", "enough")
                    },
                }


def _point(row: Values) -> Values:
    ends = {
        f"{name}_{end}": value
        for name in ("gain", "general")
        for end, value in _ends(row[name]).items()
    }
    return {**{name: row[name] for name in POINT}, **ends}


def _provenance(summary: Values) -> Rows:
    """Return a row for each trained model."""
    base, data = summary["base"], summary["data"]
    return [
        {
            "model": label,
            "trained": page_sections.training_method(summary, label),
            "learning_rate": learning_rate(summary, label),
            **{name: model["figures"].get(name) for name in TRAINED},
            "base": base["id"],
            "base_revision": base["revision"],
            "data": summary["recipe"]["data"]["source"],
            "data_digest": data["digest"],
            "commit": summary["commit"],
            "machine": summary["machine"],
        }
        for label, model in summary["models"].items()
        if "figures" in model
    ]


def _spectra(spectrum: Mapping[str, Any]) -> Rows:
    """Return a row for each adapter and module."""
    return [
        {
            "model": label,
            **{name: module[name] for name in ("module", "rank", "effective_rank")},
            **{
                f"singular_value_{place + 1}": value
                for place, value in enumerate(module["values"][:LARGEST])
            },
        }
        for label, modules in spectrum.items()
        for module in modules
    ]


def _ends(interval: Mapping[str, float] | None) -> dict[str, float | None]:
    """Return mean and ends; each None where there is no interval."""
    return {end: None if interval is None else interval[end] for end in INTERVAL}
