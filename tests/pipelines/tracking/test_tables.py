"""The tables on MLflow's pages hold what the page holds, of every comparison, in a form that JSON keeps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from summaries import BENCHMARKS, UNUSUAL, Summary, a_rate_that_diverged, build

from pipelines.tracking.tables import LARGEST, tables


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    return build(tmp_path)


def rows(summary: Summary, name: str) -> list[dict[str, Any]]:
    table = tables(summary)[f"{name}.json"]
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_each_rule_of_each_adapter_has_a_row(summary: Summary) -> None:
    found = rows(summary, "rules")
    assert len(found) == 6
    assert found[3] == {
        "model": "rank-4",
        "rule": "forgot little",
        "status": "can't tell",
        "reason": summary["models"]["rank-4"]["verdict"]["rules"][1]["reason"],
        "verdict": "can't tell",
    }


def test_power_is_told_of_all_benchmarks_and_of_each(summary: Summary) -> None:
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
        model.get("power", {}).pop("benchmarks", None)
    assert [row["benchmark"] for row in rows(summary, "power")] == ["all"] * 3


def test_what_was_trained_on_what_for_how_long(summary: Summary) -> None:
    control, *_, last = rows(summary, "provenance")
    assert (control["model"], control["trained"], control["learning_rate"]) == (
        "control",
        "all weights, in full precision",
        1e-4,
    )
    assert (last["model"], last["trained"], last["learning_rate"]) == (
        "rank-16",
        "LoRA of rank 16 over NF4",
        2e-3,
    )
    assert (last["steps"], last["tokens"], last["training_seconds"], last["data"]) == (
        15,
        17_901,
        86.2,
        "rows.jsonl",
    )
    assert (control["adapter_sha256"], last["adapter_sha256"]) == (None, "16" * 32)


def test_rates_say_what_came_of_them(summary: Summary) -> None:
    a_rate_that_diverged(summary)
    outcomes = [
        (row["rate"], row["loss"], row["outcome"]) for row in rows(summary, "control_rates")
    ]
    assert outcomes == [
        ("0.0001", 2.91, "chosen"),
        ("0.0003", 3.02, ""),
        ("0.001", None, "diverged"),
    ]


def test_spectra_have_their_largest_values(summary: Summary) -> None:
    found = rows(summary, "spectra")
    assert len(found) == sum(map(len, summary["spectrum"].values()))
    module, row = summary["spectrum"]["rank-64"][0], found[0]
    assert (row["model"], row["module"], row["rank"], row["effective_rank"]) == (
        "rank-64",
        module["module"],
        module["rank"],
        module["effective_rank"],
    )
    assert [row[f"singular_value_{place}"] for place in range(1, LARGEST + 1)] == module["values"][
        :LARGEST
    ]


def test_a_divergence_has_its_interval(summary: Summary) -> None:
    (row,) = [
        row
        for row in rows(summary, "comparison")
        if (row["model"], row["figure"]) == ("rank-16", "kl")
    ]
    assert (row["value"], row["value_low"], row["value_high"]) == (0.05, 0.04, 0.06)


@pytest.mark.parametrize("alter", UNUSUAL)
def test_unusual_comparisons_have_tables(
    summary: Summary, alter: Callable[[Summary], None]
) -> None:
    alter(summary)
    for name, table in tables(summary).items():
        json.dumps(table, allow_nan=False)
        assert table["data"] and all(len(row) == len(table["columns"]) for row in table["data"]), (
            name
        )
