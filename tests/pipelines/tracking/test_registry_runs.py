"""The MLflow runs of a comparison, in a real SQLite store: complete, and nothing twice."""

import json
from pathlib import Path
from typing import Any

import pytest
from registered import register, training_stage, write_rows, write_training
from summaries import (
    ODD,
    Summary,
    a_rate_that_diverged,
    figures_of_any_scale,
    no_general_ability,
)

from pipelines.config.recipe import load_recipe
from pipelines.errors import RegistryError
from pipelines.reporting.origin import NO_FLOW_RUN

mlflow = pytest.importorskip("mlflow")
from pipelines.tracking.recorder import Recorder  # noqa: E402
from pipelines.tracking.registry import describe  # noqa: E402

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_store")]
STEPS = 700
METRICS = {
    "task/loss",
    "task/chrf",
    "task/gain",
    "general/choice_probability",
    "general/change",
    "benchmark/hellaswag",
    "benchmark/lambada",
    "benchmark/piqa",
    "cost/file_megabytes",
    "train/loss",
}
"""All of a rank's run: a metric that is the same for all models is left out."""
TABLES = {
    "comparison.json",
    "metrics.json",
    "benchmarks.json",
    "rules.json",
    "power.json",
    "frontier.json",
    "provenance.json",
    "control_rates.json",
    "spectra.json",
}


def training_row(step: int) -> dict[str, Any]:
    """Return a row as training writes it."""
    return {
        "step": step,
        "loss": 3.0 / step,
        "learning_rate": 1e-3,
        "grad_norm": 0.5 * step,
        "tokens_per_second": 207.5,
        "peak_memory_bytes": 10**9,
        "seconds": 2.0,
        "seconds_of": {"data": 0.1, "backward": 0.9},
        "time": 1000.0 + 2 * step,
    }


def test_model_run_has_parameters_metrics_and_curve(comparison: Summary, runs: Path) -> None:
    write_training(Path(comparison["models"]["rank-4"]["training"]["folder"]), STEPS)
    result = register(comparison, runs)
    client = mlflow.MlflowClient()
    run = client.get_run(result.runs["rank-4"])
    assert run.data.params == {
        "method": "lora",
        "lora.r": "4",
        "lora.alpha": "32",
        "learning_rate": "0.002",
        "quantization": "nf4",
    }
    assert run.data.metrics.keys() == METRICS
    assert run.data.tags["mlflow.user"]
    assert run.info.start_time == 1000 * 1000
    assert run.info.end_time == 1000 * (1000 + 2 * STEPS)
    # more points than one request can have
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == STEPS
    assert run.inputs.dataset_inputs[0].dataset.digest == comparison["data"]["digest"][:36]


def test_control_run_has_the_learning_rate_search(comparison: Summary, runs: Path) -> None:
    result = register(comparison, runs)
    control = mlflow.MlflowClient().get_run(result.runs["control"]).data
    assert control.params == {"method": "full", "quantization": "none"}
    groups = {name.partition("/")[0] for name in control.metrics}
    assert groups == {"reference", "train"}
    assert json.loads(control.tags["lora.control.rates"]) == comparison["control"]["rates"]
    assert control.tags["lora.control.words"] == comparison["control"]["words"]


def test_parent_run_has_decision_and_note(comparison: Summary, runs: Path) -> None:
    result = register(comparison, runs, [Path(comparison["items"]["base"])], "a table")
    client = mlflow.MlflowClient()
    parent = client.get_run(result.parent_run).data
    assert parent.tags["lora.decision"] == comparison["decision"]
    note, link = parent.tags["mlflow.note.content"].split("\n\n")
    assert note == "a table"
    assert f"viewStateShareKey={result.parent_run}" in link
    champion = client.get_model_version_by_alias(comparison["name"], "champion")
    digest = comparison["models"]["rank-16"]["training"]["result"]["saved"]["adapter_sha256"]
    assert champion.tags["adapter_sha256"] == digest


def test_model_links_the_run_of_its_training(comparison: Summary, runs: Path) -> None:
    """The training's run is not a model of the comparison; if it was killed, it is ended."""
    stage = training_stage(comparison["name"], runs)
    trained = comparison["models"]["rank-4"]["training"]
    trained["key"] = stage.key
    rows = [training_row(1), training_row(2)]
    write_rows(Path(trained["folder"]), rows)
    experiment = comparison["recipe"]["registry"]["experiment"] or comparison["name"]
    recorder = Recorder(stage, experiment, started=0)
    recorder.take(rows[:1])
    assert recorder.send() is None

    result = register(comparison, runs)
    assert register(comparison, runs) == result
    client = mlflow.MlflowClient()
    rank_4 = client.get_run(result.runs["rank-4"]).data
    training = client.get_run(rank_4.tags["lora.training_run"])
    assert training.info.run_name == "rank-4 training"
    assert training.info.status == "FINISHED"
    assert training.info.end_time == 1004 * 1000
    assert training.data.params == rank_4.params
    curves = {name for name in rank_4.metrics if name.startswith("train/")}
    assert curves < training.data.metrics.keys()
    assert "train/seconds_backward" in training.data.metrics
    assert "lora.training_run" not in client.get_run(result.runs["rank-16"]).data.tags
    parent_and_training = 2
    found = client.search_runs([result.experiment_id])
    assert len(found) == len(comparison["models"]) + parent_and_training


def test_frontier_is_a_table_and_not_runs(comparison: Summary, runs: Path) -> None:
    result = register(comparison, runs)
    register(comparison, runs)  # does not append rows
    client = mlflow.MlflowClient()
    experiment = result.experiment_id
    assert set(result.runs) == set(comparison["models"])
    assert len(client.search_runs([experiment])) == 1 + len(comparison["models"])
    tags = client.get_run(result.parent_run).data.tags
    entries = json.loads(tags["mlflow.loggedArtifacts"])
    assert {entry["path"] for entry in entries} == TABLES
    frontier = client.load_table(experiment, "frontier.json", [result.parent_run])
    assert list(frontier["label"]) == [row["label"] for row in comparison["frontier"]]
    expected = [row["general"]["low"] for row in comparison["frontier"]]
    assert list(frontier["general_low"]) == pytest.approx(expected)


def test_tables_have_changes_with_intervals(comparison: Summary, runs: Path) -> None:
    result = register(comparison, runs)
    client = mlflow.MlflowClient()
    experiment = result.experiment_id
    parents = [result.parent_run]
    benchmarks = client.load_table(experiment, "benchmarks.json", parents)
    query = "model == 'rank-16' and benchmark == 'piqa' and effect == 'in_all'"
    row = benchmarks.query(query).iloc[0]
    piqa = comparison["models"]["rank-16"]["total"]["benchmarks"]["piqa"]
    assert row["adjusted_p"] == pytest.approx(piqa["adjusted_p"])
    metrics = client.load_table(experiment, "metrics.json", parents)
    row = metrics.query("model == 'rank-4' and figure == 'chat_loss'").iloc[0]
    chat_loss = comparison["models"]["rank-4"]["change"]["chat_loss"]
    assert row["by_training_low"] == chat_loss["low"]


def test_recipe_is_logged_with_the_comparison(
    comparison: Summary, runs: Path, tmp_path: Path
) -> None:
    parent = register(comparison, runs).parent_run
    path = mlflow.artifacts.download_artifacts(
        run_id=parent, artifact_path="recipe.yaml", dst_path=str(tmp_path / "fetched")
    )
    assert load_recipe(path).model_dump(mode="json") == comparison["recipe"]


def test_describe_replaces_note_and_files(comparison: Summary, runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("before")
    result = register(comparison, runs, [page], "a note")
    page.write_text("after")
    describe(result, runs, [page], "another note", NO_FLOW_RUN)
    client = mlflow.MlflowClient()
    parent = result.parent_run
    note = client.get_run(parent).data.tags["mlflow.note.content"]
    assert note.startswith("another note\n\n")
    downloaded = Path(client.download_artifacts(parent, page.name, str(tmp_path)))
    assert downloaded.read_text() == "after"


def test_comparison_without_general_abilities_is_registered(
    comparison: Summary, runs: Path
) -> None:
    no_general_ability(comparison)
    result = register(comparison, runs)
    assert len(result.versions) == 2
    assert result.aliases == {}
    client = mlflow.MlflowClient()
    parents = [result.parent_run]
    frontier = client.load_table(result.experiment_id, "frontier.json", parents)
    assert frontier["general_mean"].isna().all()
    assert not frontier["gain_mean"].isna().any()
    assert client.get_model_version(comparison["name"], "1").tags["general_change"] == "None"


def test_odd_names_and_metrics_of_any_scale_are_registered(comparison: Summary, runs: Path) -> None:
    figures_of_any_scale(comparison)
    a_rate_that_diverged(comparison)
    name = "it's 50% of |é| <b>"
    comparison["recipe"]["registry"]["model"] = name
    result = register(comparison, runs)
    assert register(comparison, runs) == result
    client = mlflow.MlflowClient()
    metrics = client.get_run(result.runs["base"]).data.metrics
    assert metrics["reference/task_my_metrics_a_b_"] == 1e30
    ranks = client.get_run(result.runs["rank-4"]).data.metrics
    assert not any("50_ of" in name for name in ranks)  # the same for all models
    assert client.get_model_version_by_alias(name, "champion").tags["rank"] == "16"
    parents = [result.parent_run]
    benchmarks = client.load_table(result.experiment_id, "benchmarks.json", parents)
    assert ODD in set(benchmarks["benchmark"])
    control = client.get_run(result.runs["control"]).data
    assert json.loads(control.tags["lora.control.rates"])["0.001"] is None


def test_adapter_near_the_size_of_a_base_is_refused(comparison: Summary, runs: Path) -> None:
    comparison["base"]["weights"] = 5
    with pytest.raises(RegistryError, match="near the size of a base"):
        register(comparison, runs)
