"""What MLflow is told of a comparison, asked of a real SQLite store: nothing twice, nothing but the adapter's bytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from summaries import (
    ODD,
    Summary,
    a_rate_that_diverged,
    build,
    figures_of_any_scale,
    no_general_ability,
)
from tiny import save_tiny_model

from lora_core.files import sha256_of_file
from pipelines.config.recipe import load_recipe
from pipelines.errors import RegistryError
from pipelines.runtime.stage import Stage
from pipelines.tracking import logged
from pipelines.tracking.model_card import card

mlflow = pytest.importorskip("mlflow")
from mlflow.utils.validation import _validate_metric_name  # noqa: E402

pytestmark = pytest.mark.server
STEPS = 700
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let each test's store be a file beside its runs; MLflow writes the address it is given into the environment.

    Where none is given it makes a file where the command runs, which is no place of the repository.
    """
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.chdir(tmp_path)
    yield
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; making its store takes long."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def summary(tmp_path: Path, request: pytest.FixtureRequest) -> Summary:
    """A comparison under the test's own name, with the folders that training leaves."""
    values = build(tmp_path)
    name = request.node.name.partition("[")[0]
    values |= {"name": name, "key": name.ljust(64, "k")}
    values["recipe"]["registry"]["model"] = name
    for label, model in values["models"].items():
        if "figures" in model:
            model["folder"] = str(write_training(tmp_path / "train" / label))
        if "verdict" in model:
            model["figures"]["adapter_sha256"] = write_adapter(
                tmp_path / "train" / label / "adapter", label
            )
    return values


def write_training(folder: Path, steps: int = 2) -> Path:
    rows = [
        {
            "step": s,
            "loss": 3.0,
            "learning_rate": 1e-3,
            "grad_norm": None,
            "seconds": 2.0,
            "time": 1000.0 + 2 * s,
        }
        for s in range(1, steps + 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row_of(step: int) -> Summary:
    """Return a row as training writes it."""
    figures = {
        "loss": 3.0,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 207.5,
        "peak_memory_bytes": 10**9,
    }
    return {
        "step": step,
        **figures,
        "seconds": 2.0,
        "seconds_of": {"data": 0.1, "backward": 0.9},
        "time": 1000.0 + 2 * step,
    }


def write_adapter(folder: Path, content: str) -> str:
    """Write a file in the place of an adapter's weights; return its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_text(content)
    return sha256_of_file(folder / WEIGHTS)


def later(summary: Summary, content: str, **changes: Any) -> Summary:
    """Return a comparison that came after, whose rank 16 was trained anew."""
    summary = json.loads(json.dumps(summary)) | changes
    model = summary["models"]["rank-16"]
    model["folder"] = str(write_training(Path(f"{model['folder']}-{content}")))
    model["figures"]["adapter_sha256"] = write_adapter(Path(model["folder"]) / "adapter", content)
    return summary | {"key": content.ljust(64, "k")}


def held_against(summary: Summary, version: int) -> Summary:
    """Return the incumbent that a comparison keeps of a registered version."""
    found = mlflow.MlflowClient().get_model_version(summary["name"], str(version))
    return {
        "version": str(version),
        "adapter_sha256": found.tags["adapter_sha256"],
        "label": f"champion-{version}",
        "words": "",
    }


def test_runs_carry_what_people_compare(summary: Summary, runs: Path) -> None:
    from pipelines.tracking.registry import register

    write_training(Path(summary["models"]["rank-4"]["folder"]), STEPS)
    found = register(summary, runs, [Path(summary["items"]["base"])], "a table")
    client = mlflow.MlflowClient()
    rank_4 = client.get_run(found["runs"]["rank-4"])
    assert rank_4.data.params == {
        "method": "lora",
        "lora.r": "4",
        "lora.alpha": "32",
        "learning_rate": "0.002",
        "quantization": "nf4",
    }
    names = {
        "task/loss",
        "task/perplexity",
        "task/chrf",
        "task/gain",
        "general/change",
        "general/text_loss",
        "benchmark/piqa",
    }
    assert (
        names | {"kl/by_training", "power/needed", "cost/file_bytes", "train/loss"}
        <= rank_4.data.metrics.keys()
    )
    assert (rank_4.info.start_time, rank_4.info.end_time) == (
        1000 * 1000,
        1000 * (1000 + 2 * STEPS),
    )
    assert (
        len(client.get_metric_history(rank_4.info.run_id, "train/loss")) == STEPS
    )  # more points than one request takes
    assert rank_4.inputs.dataset_inputs[0].dataset.digest == summary["data"]["digest"][:36]
    control = client.get_run(found["runs"]["control"]).data
    assert control.params == {"method": "full", "learning_rate": "0.0001", "quantization": "none"}
    assert json.loads(control.tags["lora.control.rates"]) == summary["control"]["rates"]
    assert control.tags["lora.control.words"] == summary["control"]["words"]
    parent = client.get_run(found["parent_run"]).data
    assert (parent.tags["lora.decision"], parent.tags["mlflow.note.content"]) == (
        summary["decision"],
        "a table",
    )
    champion = client.get_model_version_by_alias(summary["name"], "champion")
    assert (
        champion.tags["adapter_sha256"] == summary["models"]["rank-16"]["figures"]["adapter_sha256"]
    )


def test_a_model_names_the_run_of_its_training(summary: Summary, runs: Path) -> None:
    """What was told while it went on is no model of the comparison; a run that nobody ended, as after a kill, is ended."""
    from pipelines.tracking.recorder import Recorder
    from pipelines.tracking.registry import register

    inputs = {
        "method": "lora",
        "rank": 4,
        "lora": {"alpha": 32.0},
        "learning_rate": 0.002,
        "quantization": "nf4",
        "of": summary["name"],
    }
    stage = Stage("train", "rank-4", inputs, runs)
    model = summary["models"]["rank-4"]
    model["key"] = stage.key
    rows = [row_of(step) for step in (1, 2)]
    (Path(model["folder"]) / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    recorder = Recorder(
        stage, summary["recipe"]["registry"]["experiment"] or summary["name"], began=0
    )
    recorder.take(rows[:1])
    assert recorder.send() is None

    found = register(summary, runs, [], "")
    assert register(summary, runs, [], "") == found
    client = mlflow.MlflowClient()
    rank_4 = client.get_run(found["runs"]["rank-4"]).data
    training = client.get_run(rank_4.tags["lora.training_run"])
    assert (training.info.run_name, training.info.status, training.info.end_time) == (
        "rank-4 training",
        "FINISHED",
        1004 * 1000,
    )
    assert training.data.params == rank_4.params
    curves = {name for name in rank_4.metrics if name.startswith("train/")}
    assert (
        curves == {name for name in training.data.metrics if name.startswith("train/")}
        and "train/seconds_backward" in curves
    )
    assert "lora.training_run" not in client.get_run(found["runs"]["rank-16"]).data.tags
    assert len(client.search_runs([found["experiment_id"]])) == 1 + len(summary["models"]) + 1


def test_the_frontier_is_a_table_and_no_run(summary: Summary, runs: Path) -> None:
    from pipelines.tracking.registry import register

    found = register(summary, runs, [], "")
    register(summary, runs, [], "")  # rows are not added to
    client = mlflow.MlflowClient()
    assert set(found["runs"]) == set(summary["models"])
    assert len(client.search_runs([found["experiment_id"]])) == 1 + len(summary["models"])
    shown = {
        entry["path"]
        for entry in json.loads(
            client.get_run(found["parent_run"]).data.tags["mlflow.loggedArtifacts"]
        )
    }
    named = (
        "comparison",
        "benchmarks",
        "rules",
        "power",
        "frontier",
        "provenance",
        "control_rates",
        "spectra",
    )
    assert shown == {f"{name}.json" for name in named}
    frontier = client.load_table(found["experiment_id"], "frontier.json", [found["parent_run"]])
    assert list(frontier["label"]) == [row["label"] for row in summary["frontier"]]
    assert list(frontier["general_low"]) == pytest.approx(
        [row["general"]["low"] for row in summary["frontier"]]
    )
    benchmarks = client.load_table(found["experiment_id"], "benchmarks.json", [found["parent_run"]])
    row = benchmarks.query(
        "model == 'rank-16' and benchmark == 'piqa' and effect == 'in_all'"
    ).iloc[0]
    assert row["adjusted_p"] == pytest.approx(
        summary["models"]["rank-16"]["total"]["benchmarks"]["piqa"]["adjusted_p"]
    )
    figures = client.load_table(found["experiment_id"], "comparison.json", [found["parent_run"]])
    row = figures.query("model == 'rank-4' and figure == 'chat_loss'").iloc[0]
    assert row["by_training_low"] == summary["models"]["rank-4"]["change"]["chat_loss"]["low"]


def test_registering_again_makes_nothing_new(summary: Summary, runs: Path) -> None:
    from pipelines.tracking.registry import register

    first = register(summary, runs, [], "")
    assert register(summary, runs, [], "") == first
    assert len(mlflow.MlflowClient().search_model_versions(f"name = '{summary['name']}'")) == 2
    assert set(first["versions"]) == {"rank-4", "rank-16"}, (
        "neither the control nor the adapter that was rejected"
    )


def test_a_version_says_what_was_judged_last(summary: Summary, runs: Path) -> None:
    from pipelines.tracking.registry import register

    first = register(summary, runs, [], "")
    summary["models"]["rank-4"]["verdict"] |= {"status": "pass", "reason": "more items were scored"}
    assert register(summary | {"key": "b" * 64}, runs, [], "")["versions"] == first["versions"]
    tags = (
        mlflow.MlflowClient()
        .get_model_version(summary["name"], str(first["versions"]["rank-4"]))
        .tags
    )
    assert (tags["verdict"], tags["reason"], tags["comparison"]) == (
        "pass",
        "more items were scored",
        "b" * 64,
    )


def test_the_files_of_a_version_say_what_was_judged_last(
    summary: Summary, runs: Path, tmp_path: Path
) -> None:
    from pipelines.tracking.registry import download, register

    register(summary, runs, [], "")
    again = json.loads(json.dumps(summary)) | {"key": "c" * 64}
    again["models"]["rank-16"]["verdict"]["rules"][0] |= {"reason": "more examples were scored"}
    weights = (Path(summary["models"]["rank-16"]["folder"]) / "adapter" / WEIGHTS).read_bytes()
    for place, one in enumerate((summary, again)):
        register(one, runs, [], "")
        folder = download(f"models:/{summary['name']}@champion", runs, tmp_path / str(place))
        assert (folder / "README.md").read_text(encoding="utf-8") == card(one, "rank-16")
        assert (folder / WEIGHTS).read_bytes() == weights
    assert card(summary, "rank-16") != card(again, "rank-16")


def test_the_recipe_is_kept_with_the_comparison(
    summary: Summary, runs: Path, tmp_path: Path
) -> None:
    from pipelines.tracking.registry import register

    parent = register(summary, runs, [], "")["parent_run"]
    path = mlflow.artifacts.download_artifacts(
        run_id=parent, artifact_path="recipe.yaml", dst_path=str(tmp_path / "fetched")
    )
    assert load_recipe(path).model_dump(mode="json") == summary["recipe"]


def test_what_is_registered_is_told_afterwards(
    summary: Summary, runs: Path, tmp_path: Path
) -> None:
    from pipelines.tracking.registry import describe, register

    page = tmp_path / "report.html"
    page.write_text("before")
    found = register(summary, runs, [page], "a note")
    page.write_text("after")
    describe(found, runs, [page], "another note")
    client = mlflow.MlflowClient()
    assert client.get_run(found["parent_run"]).data.tags["mlflow.note.content"] == "another note"
    assert (
        Path(client.download_artifacts(found["parent_run"], page.name, str(tmp_path))).read_text()
        == "after"
    )


def test_without_general_abilities_all_is_registered(summary: Summary, runs: Path) -> None:
    from pipelines.tracking.registry import register

    no_general_ability(summary)
    found = register(summary, runs, [], "")
    assert len(found["versions"]) == 2 and found["aliases"] == {}
    client = mlflow.MlflowClient()
    frontier = client.load_table(found["experiment_id"], "frontier.json", [found["parent_run"]])
    assert frontier["general_mean"].isna().all() and not frontier["gain_mean"].isna().any()
    assert client.get_model_version(summary["name"], "1").tags["general_change"] == "None"


def test_odd_names_and_figures_of_any_scale_are_registered(summary: Summary, runs: Path) -> None:
    from pipelines.tracking.registry import register

    figures_of_any_scale(summary)
    a_rate_that_diverged(summary)
    name = summary["recipe"]["registry"]["model"] = "it's 50% of |é| <b>"
    found = register(summary, runs, [], "")
    assert register(summary, runs, [], "") == found
    client = mlflow.MlflowClient()
    metrics = client.get_run(found["runs"]["base"]).data.metrics
    assert metrics["task/my_metrics_a_b_"] == 1e30
    assert [value for key, value in metrics.items() if "50_ of" in key] == [-123456.789]
    assert client.get_model_version_by_alias(name, "champion").tags["rank"] == "16"
    benchmarks = client.load_table(found["experiment_id"], "benchmarks.json", [found["parent_run"]])
    assert ODD in set(benchmarks["benchmark"])
    assert (
        json.loads(client.get_run(found["runs"]["control"]).data.tags["lora.control.rates"])[
            "0.001"
        ]
        is None
    )


def test_an_adapter_near_the_size_of_a_base_is_refused(summary: Summary, runs: Path) -> None:
    from pipelines.tracking.registry import register

    summary["base"]["weights"] = 5
    with pytest.raises(RegistryError, match="near the size of a base"):
        register(summary, runs, [], "")


def test_what_cannot_be_told_never_becomes_champion(summary: Summary, runs: Path) -> None:
    from pipelines.tracking.registry import register

    summary["champion"] = "rank-4"
    with pytest.raises(
        RegistryError, match='rank-4 is named champion, but its verdict is "can\'t tell"'
    ):
        register(summary, runs, [], "")
    summary["champion"] = "control"
    with pytest.raises(RegistryError, match="its verdict is None"):
        register(summary, runs, [], "")


def test_no_champion_moves_no_champion(summary: Summary, runs: Path) -> None:
    from pipelines.tracking.registry import incumbent, register

    first = register(summary, runs, [], "")
    second = later(
        summary,
        "second",
        champion=None,
        incumbent=held_against(summary, first["aliases"]["champion"]),
    )
    assert register(second, runs, [], "")["aliases"] == {"candidate": 3}
    found = incumbent(summary["name"], runs, runs / "incumbents")
    assert found is not None and int(found.version) == first["aliases"]["champion"]


def test_a_champion_replaces_only_the_one_it_was_compared_with(
    summary: Summary, runs: Path
) -> None:
    from pipelines.tracking.registry import register

    client, name = mlflow.MlflowClient(), summary["name"]
    first = register(summary, runs, [], "")["aliases"]["champion"]
    compared = held_against(summary, first)
    second = register(later(summary, "second", incumbent=compared), runs, [], "")["aliases"][
        "champion"
    ]
    assert second != first

    third = later(
        summary, "third", incumbent=compared
    )  # compared with the first, while the second was registered
    with pytest.raises(
        RegistryError,
        match=f"has version {second} as its champion, but rank-16 was compared with version {first}; run the",
    ):
        register(third, runs, [], "")
    assert int(client.get_model_version_by_alias(name, "champion").version) == second
    assert int(client.get_model_version_by_alias(name, "candidate").version) == 4
    with pytest.raises(RegistryError, match="was compared with none"):
        register(third | {"incumbent": None}, runs, [], "")

    client.delete_registered_model_alias(name, "champion")
    with pytest.raises(RegistryError, match="has no champion, but"):
        register(third, runs, [], "")
    assert register(third | {"incumbent": None}, runs, [], "")["aliases"] == {
        "candidate": 4,
        "champion": 4,
    }


def test_a_recipe_that_does_not_compare_champions_replaces_any(
    summary: Summary, runs: Path
) -> None:
    from pipelines.tracking.registry import register

    register(summary, runs, [], "")
    second = later(summary, "second")
    second["recipe"]["gate"]["min_gain_over_champion"] = None
    assert register(second, runs, [], "")["aliases"]["champion"] == 3


def test_a_champion_of_the_same_comparison_was_compared(summary: Summary, runs: Path) -> None:
    from pipelines.tracking.registry import register

    first = register(summary, runs, [], "")
    summary["models"]["rank-4"]["verdict"]["status"] = "pass"
    assert (
        register(summary | {"champion": "rank-4"}, runs, [], "")["aliases"]["champion"]
        == first["versions"]["rank-4"]
    )


def test_the_incumbent_is_fetched_once_and_whole(
    summary: Summary, runs: Path, tmp_path: Path
) -> None:
    from pipelines.tracking.registry import incumbent, register

    assert incumbent(summary["name"], runs, tmp_path) is None
    first = register(summary, runs, [], "")
    found = incumbent(summary["name"], runs, tmp_path)
    assert found is not None
    assert (int(found.version), found.tags["verdict"]) == (first["aliases"]["champion"], "pass")
    assert (
        sha256_of_file(found.folder / WEIGHTS)
        == found.adapter_sha256
        == summary["models"]["rank-16"]["figures"]["adapter_sha256"]
    )
    before = (found.folder / WEIGHTS).stat().st_mtime_ns
    assert incumbent(summary["name"], runs, tmp_path) == found
    assert (found.folder / WEIGHTS).stat().st_mtime_ns == before
    (found.folder / WEIGHTS).write_text("half of i")
    assert incumbent(summary["name"], runs, tmp_path) == found
    assert sha256_of_file(found.folder / WEIGHTS) == found.adapter_sha256
    mlflow.MlflowClient().set_model_version_tag(
        summary["name"], found.version, "adapter_sha256", "0" * 64
    )
    with pytest.raises(RegistryError, match="does not hold the adapter of its tag"):
        incumbent(summary["name"], runs, tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_downloaded_adapter_has_its_card_and_loads_in_peft(
    summary: Summary, runs: Path, tmp_path: Path
) -> None:
    import torch
    from huggingface_hub import ModelCard
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_core import LoraConfig, inject, load_adapter, save_adapter
    from lora_core.adapter.io import Identity
    from pipelines.tracking.registry import download, register

    base = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",))
    inject(model, config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    adapter = Path(summary["models"]["rank-16"]["folder"]) / "adapter"
    summary["models"]["rank-16"]["figures"]["adapter_sha256"] = save_adapter(
        model, adapter, config, Identity(base=str(base))
    )
    kept = {path.name: path.read_bytes() for path in adapter.iterdir()}
    register(summary, runs, [], "")

    folder = download(f"models:/{summary['name']}@champion", runs, tmp_path / "fetched")
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == kept
    assert all((folder / name).read_bytes() == content for name, content in kept.items())
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    ids = torch.arange(6)[None]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoModelForCausalLM.from_pretrained(base),
    )
    load_adapter(ours, folder)
    peft = PeftModel.from_pretrained(theirs, folder)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, peft(ids).logits)


def test_what_was_not_trained_has_no_curve_and_no_time(summary: Summary) -> None:
    base = summary["models"]["base"]
    assert list(logged.curve(base)) == []
    assert logged.training_time(base) is None
    assert "task/gain" not in logged.metrics(base)


def test_names_are_such_as_every_server_takes(summary: Summary) -> None:
    scores = summary["models"]["base"]["scores"]
    scores["generation"]["my.checks:polite"] = 50.0
    scores["benchmarks"]["50% of (x)"] = {
        "choice_probability": None,
        "accuracy": 0.25,
        "items": 4,
        "left_out": 0,
    }
    found = logged.metrics(summary["models"]["base"])
    assert found["task/my.checks_polite"] == 50.0
    assert found["benchmark/50_ of _x_"] == 0.25
    for odd in ("..", "a//b", "a/../b", "x/", "./x", "é" * 300):
        scores["benchmarks"] = {
            odd: {"choice_probability": None, "accuracy": 0.5, "items": 4, "left_out": 0}
        }
        (name,) = [
            name
            for name in logged.metrics(summary["models"]["base"])
            if name.startswith("benchmark/")
        ]
        _validate_metric_name(name)


def test_a_control_by_lora_has_its_rank(summary: Summary) -> None:
    summary["recipe"]["control"] |= {"method": "lora", "rank": 128}
    expected = {
        "method": "lora",
        "lora.r": "128",
        "lora.alpha": "32",
        "learning_rate": "0.0001",
        "quantization": "nf4",
    }
    assert logged.parameters(summary, "control") == expected
