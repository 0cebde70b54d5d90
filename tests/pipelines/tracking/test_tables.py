"""The tables on the MLflow pages have the content of the report, as valid JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from summaries import BENCHMARKS, UNUSUAL, Summary, a_rate_that_diverged, build, parsed

from pipelines.tracking.tables import MAX_SINGULAR_VALUES, tables


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    return build(tmp_path)


def rows(summary: Summary, name: str) -> list[dict[str, Any]]:
    table = tables(parsed(summary))[f"{name}.json"]
    return [dict(zip(table.columns, row, strict=True)) for row in table.data]


def test_each_rule_of_each_adapter_has_a_row(summary: Summary) -> None:
    found = rows(summary, "rules")
    assert len(found) == 6
    assert found[3] == {
        "model": "rank-4",
        "rule": "forgot little",
        "status": "can't tell",
        "reason": summary["models"]["rank-4"]["judgment"]["verdict"]["rules"][1]["reason"],
        "verdict": "can't tell",
    }


def test_power_has_a_row_for_all_benchmarks_and_for_each(summary: Summary) -> None:
    found = rows(summary, "power")
    assert [row["benchmark"] for row in found] == ["all", *BENCHMARKS] * 3
    assert found[0] == {
        "model": "rank-64",
        "benchmark": "all",
        "items": 120,
        "needed": 154,
        "smallest_drop": 0.026,
        "enough": False,
    }
    for model in summary["models"].values():
        model.get("power", {})["benchmarks"] = {}
    assert [row["benchmark"] for row in rows(summary, "power")] == ["all"] * 3


def selected(row: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in expected}


def test_provenance_has_method_data_and_time(summary: Summary) -> None:
    control, *_, last = rows(summary, "provenance")
    expected = {
        "model": "control",
        "trained": "all weights, in full precision",
        "learning_rate": 1e-4,
        "adapter_sha256": None,
    }
    assert selected(control, expected) == expected
    expected = {
        "model": "rank-16",
        "trained": "LoRA of rank 16 over NF4",
        "learning_rate": 2e-3,
        "adapter_sha256": "16" * 32,
        "steps": 15,
        "tokens": 17_901,
        "training_seconds": 86.2,
        "data": "rows.jsonl",
    }
    assert selected(last, expected) == expected


def test_control_rates_have_outcomes(summary: Summary) -> None:
    a_rate_that_diverged(summary)
    outcomes = [
        (row["rate"], row["loss"], row["outcome"]) for row in rows(summary, "control_rates")
    ]
    assert outcomes == [
        ("0.0001", 2.91, "chosen"),
        ("0.0003", 3.02, ""),
        ("0.001", None, "diverged"),
    ]


def test_spectra_have_the_largest_values(summary: Summary) -> None:
    found = rows(summary, "spectra")
    trained = [model["training"] for model in summary["models"].values() if "training" in model]
    assert len(found) == sum(len(training["result"]["saved"]["spectrum"]) for training in trained)
    module = summary["models"]["rank-64"]["training"]["result"]["saved"]["spectrum"][0]
    expected = {
        "model": "rank-64",
        "module": module["module"],
        "rank": module["rank"],
        "effective_rank": module["effective_rank"],
        "intruders": 0,
    }
    for index in range(MAX_SINGULAR_VALUES):
        expected[f"singular_value_{index + 1}"] = module["values"][index]
    assert found[0] == expected


def test_divergence_has_an_interval(summary: Summary) -> None:
    found = {(row["model"], row["figure"]): row for row in rows(summary, "metrics")}
    expected = {"value": 0.05, "value_low": 0.04, "value_high": 0.06}
    assert selected(found["rank-16", "kl"], expected) == expected


def test_comparison_has_a_row_for_each_model(summary: Summary) -> None:
    found = rows(summary, "comparison")
    assert [row["model"] for row in found] == list(summary["models"])
    expected = {
        "model": "rank-16",
        "rank": 16,
        "verdict": "pass",
        "gain": "+0.723 (+0.623, +0.823)",
        "task_loss": 2.877,
        "learning_rate": 0.002,
        "minutes": 1.4,
        "piqa": 0.509,
    }
    assert selected(found[-1], expected) == expected
    for row in found:
        for value in row.values():
            assert not isinstance(value, float) or len(f"{value:g}") <= 6


@pytest.mark.parametrize("alter", UNUSUAL)
def test_unusual_comparison_has_tables(summary: Summary, alter: Callable[[Summary], None]) -> None:
    alter(summary)
    for name, table in tables(parsed(summary)).items():
        json.dumps(asdict(table), allow_nan=False)
        assert table.data, name
        assert {len(row) for row in table.data} == {len(table.columns)}, name
