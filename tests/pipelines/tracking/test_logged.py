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


def metrics(summary: Summary, label: str) -> dict[str, float]:
    return logged.metrics(parsed(summary), label)


def parameter_names(summary: Summary, label: str) -> set[str]:
    return set(logged.parameters(parsed(summary), label).by_name())


def benchmark(accuracy: float) -> dict[str, Any]:
    return {"choice_probability": None, "accuracy": accuracy, "items": 4, "left_out": 0}


def test_untrained_model_has_no_curve_and_no_time(summary: Summary) -> None:
    base = base_of(summary)
    assert list(logged.curve(base)) == []
    assert logged.training_time(base) is None
    assert "reference/task_gain" not in metrics(summary, "base")


def test_rank_has_few_metrics_and_none_is_constant(summary: Summary) -> None:
    ranks = [metrics(summary, label) for label in ("rank-4", "rank-16", "rank-64")]
    for found in ranks:
        assert len(found) <= 20
    for name in ranks[0]:
        assert len({found[name] for found in ranks}) > 1, name


def test_base_and_control_do_not_stretch_the_axes(summary: Summary) -> None:
    of_ranks = metrics(summary, "rank-4").keys() | parameter_names(summary, "rank-4")
    assert {"task/loss", "lora.r"} <= of_ranks
    for label in ("base", "base-nf4", "control"):
        shown = metrics(summary, label).keys() | parameter_names(summary, label)
        assert shown & of_ranks == {"method", "quantization"}  # neither is a number
        assert "reference/task_loss" in shown


def test_invalid_characters_in_names_are_replaced(summary: Summary) -> None:
    rank = summary["models"]["rank-4"]
    rank["scores"]["generation"]["my.checks:polite"] = 50.0
    rank["scores"]["benchmarks"]["50% of (x)"] = benchmark(0.25)
    found = metrics(summary, "rank-4")
    assert found["task/my.checks_polite"] == 50.0
    assert found["benchmark/50_ of _x_"] == 0.25


@pytest.mark.parametrize("odd", ["..", "a//b", "a/../b", "x/", "./x", "é" * 300])
def test_every_server_accepts_the_names(summary: Summary, odd: str) -> None:
    for label in ("base", "rank-4"):
        summary["models"][label]["scores"]["benchmarks"] = {odd: benchmark(len(label) / 10)}
        names = [name for name in metrics(summary, label) if "benchmark" in name]
        assert len(names) == 1
        _validate_metric_name(names[0])


def test_lora_control_has_no_numbers(summary: Summary) -> None:
    summary["recipe"]["control"] |= {"method": "lora", "rank": 128}
    expected = {"method": "lora", "quantization": "nf4"}
    assert logged.parameters(parsed(summary), "control").by_name() == expected


def test_base_has_no_numbers(summary: Summary) -> None:
    in_full_precision = logged.parameters(parsed(summary), "base").by_name()
    assert in_full_precision == {"method": "none", "quantization": "none"}
    in_4_bits = logged.parameters(parsed(summary), "base-nf4").by_name()
    assert in_4_bits == {"method": "none", "quantization": "nf4"}


def test_full_fine_tuning_has_no_numbers(tmp_path: Path) -> None:
    inputs = training_stage("rows", tmp_path).inputs
    full = inputs.model_copy(update={"adapter": None, "quantization": "none"})
    assert parameters(full).by_name() == {"method": "full", "quantization": "none"}
