"""A complete run on a tiny model: every stage is real, and a second run trains nothing."""

import html
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser.rendered import BROWSER, NO_BROWSER, Rendered, dump
from command import lora
from mlflow import MlflowClient
from tiny import save_pairs, save_tiny_model, tiny_recipe

from pipelines.models.processor import identify_processor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe and its completed run."""
    folder = tmp_path_factory.mktemp("run")
    save_pairs(folder / "pairs.jsonl")
    model = save_tiny_model(folder / "model")
    recipe = tiny_recipe(model, Path("pairs.jsonl"))  # relative to the working folder
    recipe["frontier"] = {"snapshots": [2], "cuts": [1]}
    # Loose bounds, so that an adapter becomes champion.
    recipe["gate"] = {
        "min_gain_share": 0.1,
        "max_general_drop": 0.9,
        "max_drop_beyond_control": 0.9,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    ended = lora(folder, "run", "tiny.yaml")
    assert ended.returncode == 0, ended.stderr
    return folder


def summary(folder: Path) -> dict[str, Any]:
    """Return the summary of the tiny run."""
    values: dict[str, Any] = json.loads(
        (folder / "runs" / "pairs_tiny_cpu" / "summary.json").read_text()
    )
    return values


@pytest.mark.server
class TestRun:
    """Aspects of one run."""

    def test_it_compares_registers_and_reports(self, folder: Path) -> None:
        values = summary(folder)
        assert list(values["models"]) == ["base", "base-nf4", "control", "rank-2", "rank-4"]
        assert values["models"]["control"]["change"]["task_gain"]["low"] > 0
        assert all(
            values["models"][label]["judgment"]["verdict"]["reason"]
            for label in ("rank-2", "rank-4")
        )
        assert sorted(values["registered"]["versions"].values()) == [1, 2]
        assert values["champion"] in ("rank-2", "rank-4")
        assert set(values["registered"]["aliases"]) == {"candidate", "champion"}
        kinds = {"base", "data", "check", "plan", "train", "cut", "evaluate", "register"}
        kinds |= {"processor"} if identify_processor().units else set()
        assert {entry["name"].split()[0] for entry in values["stages"]} == kinds
        points = ["control", "rank-2", "rank-4", "control@2", "rank-2@2", "rank-4@2", "rank-4→1"]
        assert [point["label"] for point in values["frontier"]] == points
        assert "rank-4" in (folder / "runs" / "pairs_tiny_cpu" / "report.html").read_text()
        assert {path.name for path in folder.iterdir()} == {
            "model",
            "pairs.jsonl",
            "runs",
            "tiny.yaml",
        }
        assert list((folder / "runs" / "mlartifacts").rglob("adapter_model.safetensors"))

    def test_no_page_links_to_the_server_that_ends_with_the_run(self, folder: Path) -> None:
        client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
        description = client.get_model_version("pairs-tiny", "1").description
        assert "flow run" in description
        assert "127.0.0.1" not in description

    def test_control_and_adapters_are_trained_on_the_same_tokens(self, folder: Path) -> None:
        models = summary(folder)["models"]
        totals = [
            models[label]["training"]["result"]["totals"]
            for label in ("control", "rank-2", "rank-4")
        ]
        assert len({(one["tokens"], one["supervised_tokens"]) for one in totals}) == 1

    @pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)
    def test_the_page_shows_the_measured_values(self, folder: Path) -> None:
        values, page = summary(folder), Rendered()
        text = dump(folder / "runs" / "pairs_tiny_cpu" / "report.html", folder / "browser")
        page.feed(text)
        for label, model in values["models"].items():
            assert (
                float(page.metrics[label, "task_loss"]["data-value"])
                == model["scores"]["task_loss"]
            )
            if model["judgment"] is not None:
                shown = page.metrics[label, "task_gain"]
                assert [float(shown[f"data-{end}"]) for end in ("low", "high")] == [
                    model["total"]["task_gain"][end] for end in ("low", "high")
                ]
        assert "as version 1" in text and "champion is version" in text
        assert all(load.startswith("#") for load in page.loads)

    @pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)
    def test_the_page_shows_the_prepared_data(self, folder: Path) -> None:
        data = summary(folder)["data"]
        text = dump(folder / "runs" / "pairs_tiny_cpu" / "report.html", folder / "browser")
        found = re.search(r'<section id="data">.*?</section>', text, flags=re.DOTALL)
        assert found is not None
        section = html.unescape(found[0])
        assert f"{data['train_examples']} training examples" in section
        assert data["sources"][0]["source"] in section
        shown = re.findall(r"<small>([\d,]+)</small></li>", section)
        assert [int(count.replace(",", "")) for count in shown] == data["lengths"]["counts"]
        previews = re.findall(r'<pre class="tokens">(.*?)</pre>', section, flags=re.DOTALL)
        assert len(previews) == len(data["previews"]) > 0
        for preview, tokens in zip(previews, data["previews"], strict=True):
            supervised = re.findall(r"<b>(.*?)</b>", preview, flags=re.DOTALL)
            expected = [
                token
                for token, is_learned in zip(tokens["tokens"], tokens["supervised"], strict=True)
                if is_learned
            ]
            assert supervised == expected

    def test_a_second_run_trains_nothing_and_is_quick(self, folder: Path) -> None:
        before = summary(folder)
        started = time.monotonic()
        ended = lora(folder, "run", "tiny.yaml")
        assert ended.returncode == 0, ended.stderr
        assert time.monotonic() - started < 60
        after = summary(folder)
        assert all(entry["cached"] for entry in after["stages"] if entry["name"] != "register")
        assert after["models"] == before["models"]
        assert after["registered"] == before["registered"]

    def test_compare_prints_the_table_again(self, folder: Path) -> None:
        ended = lora(folder, "compare", "pairs_tiny_cpu")
        assert ended.returncode == 0, ended.stderr
        assert "rank-4" in ended.stdout
        assert "control" in ended.stdout

    def test_a_registered_adapter_answers(self, folder: Path) -> None:
        options = ["--adapter", "models:/pairs-tiny/1", "--max-new-tokens", "4"]
        ended = lora(folder, "generate", *options, "Say red 1.")
        assert ended.returncode == 0, ended.stderr

    def test_an_adapter_on_another_base_is_refused(self, folder: Path) -> None:
        other = save_tiny_model(folder / "other", seed=1)
        adapter = str(Path(summary(folder)["models"]["rank-2"]["training"]["folder"]) / "adapter")
        options = ["--adapter", adapter, "--base", str(other)]
        ended = lora(folder, "generate", *options, "Say red 1.")
        assert ended.returncode == 2
        assert "was trained on" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_a_changed_file_is_recomputed_and_a_dead_tracking_server_loses_nothing(
        self, folder: Path
    ) -> None:
        adapter = Path(summary(folder)["models"]["rank-2"]["training"]["folder"]) / "adapter"
        weights = adapter / "adapter_model.safetensors"
        original = weights.read_bytes()
        weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        dead = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "LORA_REGISTRY_SECONDS": "1"}
        ended = lora(folder, "run", "tiny.yaml", **dead)
        assert ended.returncode == 2
        assert "the adapters are saved" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert "rank-4" in ended.stdout
        repeated = [entry["name"] for entry in summary(folder)["stages"] if not entry["cached"]]
        assert repeated == ["train rank-2", "register"]
        assert weights.read_bytes() == original
        assert lora(folder, "run", "tiny.yaml").returncode == 0
        assert summary(folder)["registered"]["versions"] == {"rank-2": 1, "rank-4": 2}
