"""Names and values of what MLflow logs of a model."""

from pathlib import Path
from typing import Any

import pytest
from registered import training_stage
from summaries import Summary, build, parsed

from pipelines.comparison.document import ModelSummary
from pipelines.tracking import logged

pytest.importorskip("mlflow")
from mlflow.utils.validation import _validate_metric_name

from pipelines.tracking.recorder import parameters


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    return build(tmp_path)


def base_of(summary: Summary) -> ModelSummary:
    return parsed(summary).models["base"]


def benchmark(accuracy: float) -> dict[str, Any]:
    return {"choice_probability": None, "accuracy": accuracy, "items": 4, "left_out": 0}


def test_untrained_model_has_no_curve_and_no_time(summary: Summary) -> None:
    base = base_of(summary)
    assert list(logged.curve(base)) == []
    assert logged.training_time(base) is None
    assert "task/gain" not in logged.metrics(base)


def test_invalid_characters_in_names_are_replaced(summary: Summary) -> None:
    base = summary["models"]["base"]
    base["scores"]["generation"]["my.checks:polite"] = 50.0
    base["scores"]["benchmarks"]["50% of (x)"] = benchmark(0.25)
    metrics = logged.metrics(base_of(summary))
    assert metrics["task/my.checks_polite"] == 50.0
    assert metrics["benchmark/50_ of _x_"] == 0.25


@pytest.mark.parametrize("odd", ["..", "a//b", "a/../b", "x/", "./x", "é" * 300])
def test_every_server_accepts_the_names(summary: Summary, odd: str) -> None:
    base = summary["models"]["base"]
    base["scores"]["benchmarks"] = {odd: benchmark(0.5)}
    (name,) = [name for name in logged.metrics(base_of(summary)) if name.startswith("benchmark/")]
    _validate_metric_name(name)


def test_lora_control_has_its_rank(summary: Summary) -> None:
    summary["recipe"]["control"] |= {"method": "lora", "rank": 128}
    expected = {
        "method": "lora",
        "lora.r": "128",
        "lora.alpha": "32",
        "learning_rate": "0.0001",
        "quantization": "nf4",
    }
    assert logged.parameters(parsed(summary), "control").by_name() == expected


def test_base_has_rank_zero(summary: Summary) -> None:
    expected = {"method": "none", "learning_rate": "0", "lora.r": "0", "lora.alpha": "0"}
    in_full_precision = logged.parameters(parsed(summary), "base").by_name()
    assert in_full_precision == expected | {"quantization": "none"}
    in_4_bits = logged.parameters(parsed(summary), "base-nf4").by_name()
    assert in_4_bits == expected | {"quantization": "nf4"}


def test_full_fine_tuning_has_no_rank(tmp_path: Path) -> None:
    inputs = training_stage("rows", tmp_path).inputs
    full = inputs.model_copy(update={"adapter": None, "quantization": "none"})
    expected = {"method": "full", "learning_rate": "0.002", "quantization": "none"}
    assert parameters(full).by_name() == expected
