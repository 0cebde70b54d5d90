"""What MLflow is told of a comparison, asked of a real SQLite store: nothing twice, nothing but the adapter's bytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import RegistryError
from pipelines.reporting import logged

mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.server
STEPS = 700
Summary = dict[str, Any]


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let each test's store be a file beside its runs; MLflow writes the address it is given into the environment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    yield
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; making its store takes long."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def summary(tmp_path: Path, request: pytest.FixtureRequest) -> Summary:
    """The summary of a run of the base, the control and one adapter, with the files it names."""
    models = {
        "base": model(tmp_path, "base", None),
        "control": model(tmp_path, "control", None, "train"),
        "rank-4": model(tmp_path, "rank-4", 4, "train"),
    }
    models["rank-4"]["verdict"] = {"status": "pass", "reason": "it learnt", "rules": []}
    recipe = {
        "base_model": {"quantization": "nf4"},
        "lora": {"ranks": [4], "learning_rate": 0.002, "alpha": 32},
        "control": {"learning_rate": 1e-4},
        "registry": {"model": request.node.name, "experiment": None},
        "data": {"source": "rows.jsonl"},
    }
    return {
        "name": request.node.name,
        "key": request.node.name.ljust(64, "k"),
        "recipe": recipe,
        "models": models,
        "items": {label: str(tmp_path / f"{label}.jsonl") for label in models},
        "base": {
            "id": "base",
            "revision": "1",
            "weights": 10**6,
            "tokenizer_sha256": "t",
            "template_sha256": "c",
            "digests": {"dense": "d"},
        },
        "data": {"digest": "f" * 64, "train_examples": 8, "train_tokens": 80, "supervised_tokens": 20},
        "decision": "rank-4 passes",
        "candidate": "rank-4",
        "champion": "rank-4",
        "commit": "abc",
        "seconds": 60.0,
    }


def model(root: Path, label: str, rank: int | None, kind: str = "") -> Summary:
    """Return one model's part of a summary, and write the files it names."""
    (root / f"{label}.jsonl").write_text("{}\n")
    benchmarks = {"piqa": {"choice_probability": 0.6, "accuracy": 0.7, "items": 4.0}}
    scores = {"task_loss": 2.5, "chrf": 30.0, "rouge_l": None, "choice_probability": 0.5, "accuracy": 0.5, "margin": 0.1}
    values: Summary = {"scores": {**scores, "benchmarks": benchmarks}, "rank": rank}
    if not kind:
        return values
    folder = root / kind / label
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    rows = [
        {"step": s, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": None, "seconds": 2.0, "time": 1000.0 + 2 * s}
        for s in range(1, STEPS + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    interval = {"mean": 0.9, "low": 0.8, "high": 1.0}
    effects = {effect: {"task_gain": interval, "choice_probability": interval} for effect in ("change", "total")}
    return {**values, **effects, "key": "s", "folder": str(folder), "figures": {"adapter_sha256": f"sha-{label}", "file_bytes": 7}}


def test_runs_carry_what_people_compare(summary: Summary, runs: Path) -> None:
    from pipelines.reporting.registry import register

    found = register(summary, runs, [Path(summary["items"]["base"])], "a table")
    client = mlflow.MlflowClient()
    rank_4 = client.get_run(found["runs"]["rank-4"])
    assert rank_4.data.params == {"method": "lora", "lora.r": "4", "lora.alpha": "32", "learning_rate": "0.002", "quantization": "nf4"}
    assert {"task/loss", "task/gain", "general/change", "benchmark/piqa", "cost/file_bytes", "train/loss"} <= rank_4.data.metrics.keys()
    assert (rank_4.info.start_time, rank_4.info.end_time) == (1000 * 1000, 1000 * (1000 + 2 * STEPS))
    assert len(client.get_metric_history(rank_4.info.run_id, "train/loss")) == STEPS  # more points than one request takes
    assert rank_4.inputs.dataset_inputs[0].dataset.digest == "f" * 36
    assert "lora.r" not in client.get_run(found["runs"]["control"]).data.params
    assert client.get_run(found["parent_run"]).data.tags["lora.decision"] == "rank-4 passes"
    assert client.get_run(found["parent_run"]).data.tags["mlflow.note.content"] == "a table"
    assert mlflow.MlflowClient().get_model_version_by_alias(summary["name"], "champion").tags["adapter_sha256"] == "sha-rank-4"


def test_registering_again_makes_nothing_new(summary: Summary, runs: Path) -> None:
    from pipelines.reporting.registry import register

    first = register(summary, runs, [], "")
    assert register(summary, runs, [], "") == first
    assert len(mlflow.MlflowClient().search_model_versions(f"name = '{summary['name']}'")) == 1


def test_an_adapter_near_the_size_of_a_base_is_refused(summary: Summary, runs: Path) -> None:
    from pipelines.reporting.registry import register

    summary["base"]["weights"] = 5
    with pytest.raises(RegistryError, match="near the size of a base"):
        register(summary, runs, [], "")


def test_what_was_not_trained_has_no_curve_and_no_time(summary: Summary) -> None:
    base = summary["models"]["base"]
    assert list(logged.curve(base)) == []
    assert logged.training_time(base) is None
    assert "task/gain" not in logged.metrics(base)
