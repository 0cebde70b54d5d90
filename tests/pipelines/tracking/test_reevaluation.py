"""Another evaluation of a recipe updates its MLflow runs: none is created twice, none is stale."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest
from registered import copied, register, retrained
from summaries import Summary

from pipelines.comparison.document import Registered

mlflow = pytest.importorskip("mlflow")

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_store")]


def evaluated_again(comparison: Summary, name: str) -> Summary:
    """Return a later comparison of the same models, with other scores and other benchmarks."""
    summary = copied(comparison) | {"key": name.ljust(64, "k")}
    summary["recipe"]["evaluation"]["items_per_benchmark"] += len(name)
    for model in summary["models"].values():
        model["scores"]["task_loss"] = round(model["scores"]["task_loss"] - 0.5, 6)
        model["scores"]["benchmarks"].pop("lambada")
    summary["models"]["rank-4"]["judgment"]["verdict"]["status"] = "pass"
    return summary


def active_runs(result: Registered) -> list[Any]:
    return list(mlflow.MlflowClient().search_runs([result.experiment_id]))


def test_three_comparisons_have_the_runs_of_the_first(comparison: Summary, runs: Path) -> None:
    first = register(comparison, runs)
    ids = {run.info.run_id for run in active_runs(first)}
    assert len(ids) == 1 + len(comparison["models"])
    second = register(evaluated_again(comparison, "again"), runs)
    third = register(evaluated_again(comparison, "more"), runs)
    assert {run.info.run_id for run in active_runs(first)} == ids
    assert {run.info.status for run in active_runs(first)} == {"FINISHED"}
    for later in (second, third):
        assert (later.runs, later.parent_run) == (first.runs, first.parent_run)
        assert later.versions == first.versions


def test_runs_have_the_values_of_the_last_evaluation(comparison: Summary, runs: Path) -> None:
    register(comparison, runs)
    later = evaluated_again(comparison, "later")
    result = register(later, runs)
    client = mlflow.MlflowClient()
    rank = client.get_run(result.runs["rank-4"]).data
    assert rank.metrics["task/loss"] == later["models"]["rank-4"]["scores"]["task_loss"]
    assert rank.metrics["benchmark/piqa"] > 0
    assert math.isnan(rank.metrics["benchmark/lambada"])  # it was not measured again
    assert rank.tags["verdict"] == "pass"
    assert client.get_run(result.parent_run).data.tags["lora.comparison"] == later["key"]
    table = client.load_table(result.experiment_id, "comparison.json", [result.parent_run])
    assert "lambada" not in table
    register(later, runs)  # changes nothing
    history = client.get_metric_history(result.runs["rank-4"], "task/loss")
    assert len(history) == 2


def test_another_training_has_its_own_run(comparison: Summary, runs: Path) -> None:
    comparison["recipe"]["gate"]["min_gain_over_champion"] = None
    first = register(comparison, runs)
    second = register(retrained(comparison, "trained again"), runs)
    assert second.parent_run != first.parent_run
    differing = {label for label in first.runs if first.runs[label] != second.runs[label]}
    assert differing == {"rank-16"}
    parent = mlflow.MlflowClient().get_run(first.runs["rank-4"]).data.tags["mlflow.parentRunId"]
    assert parent == second.parent_run


def test_simultaneous_comparisons_share_their_runs(comparison: Summary, runs: Path) -> None:
    summaries = [evaluated_again(comparison, name) for name in ("one", "two", "three")]
    results: list[Registered] = []
    barrier = threading.Barrier(len(summaries))

    def attempt(summary: Summary) -> None:
        barrier.wait()
        results.append(register(summary, runs))

    threads = [threading.Thread(target=attempt, args=(summary,)) for summary in summaries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert len(results) == len(summaries)
    assert len(active_runs(results[0])) == 1 + len(comparison["models"])
    assert {tuple(sorted(result.runs.values())) for result in results} == {
        tuple(sorted(results[0].runs.values()))
    }
