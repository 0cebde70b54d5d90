"""The whole run on a tiny model: every stage real, a second run trains nothing, a stopped run goes on."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser.rendered import BROWSER, NO_BROWSER, Rendered, dump
from command import lora
from tiny import save_pairs, save_tiny_model, tiny_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe whose run has ended."""
    folder = tmp_path_factory.mktemp("run")
    save_pairs(folder / "pairs.jsonl")
    recipe = tiny_recipe(
        save_tiny_model(folder / "model"), Path("pairs.jsonl")
    )  # relative: to where the command runs
    recipe["frontier"] = {"snapshots": [2], "cuts": [1]}
    recipe["gate"] = {
        "min_gain_share": 0.1,
        "max_general_drop": 0.9,
        "max_drop_beyond_control": 0.9,
    }  # so that one is champion
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
    """One run, looked at from several sides."""

    def test_it_compares_registers_and_reports(self, place: Path) -> None:
        values = summary(place)
        assert list(values["models"]) == ["base", "base-nf4", "control", "rank-2", "rank-4"]
        assert values["models"]["control"]["change"]["task_gain"]["low"] > 0
        assert all(values["models"][label]["verdict"]["reason"] for label in ("rank-2", "rank-4"))
        assert sorted(values["registered"]["versions"].values()) == [1, 2]
        assert values["champion"] in ("rank-2", "rank-4") and set(
            values["registered"]["aliases"]
        ) == {"candidate", "champion"}
        kinds = {"base", "data", "plan", "train", "cut", "evaluate", "register"}
        assert {entry["name"].split()[0] for entry in values["stages"]} == kinds
        points = ["control", "rank-2", "rank-4", "control@2", "rank-2@2", "rank-4@2", "rank-4→1"]
        assert [point["label"] for point in values["frontier"]] == points
        assert "rank-4" in (place / "runs" / "pairs_tiny_cpu" / "report.html").read_text()
        assert {path.name for path in place.iterdir()} == {
            "model",
            "pairs.jsonl",
            "runs",
            "tiny.yaml",
        }
        assert list((place / "runs" / "mlartifacts").rglob("adapter_model.safetensors"))

    def test_the_control_and_the_adapters_saw_the_same_tokens(self, place: Path) -> None:
        figures = [
            summary(place)["models"][label]["figures"] for label in ("control", "rank-2", "rank-4")
        ]
        assert len({(one["tokens"], one["supervised_tokens"]) for one in figures}) == 1

    @pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)
    def test_the_page_shows_what_was_measured(self, place: Path) -> None:
        values, page = summary(place), Rendered()
        text = dump(place / "runs" / "pairs_tiny_cpu" / "report.html", place / "browser")
        page.feed(text)
        for label, model in values["models"].items():
            assert (
                float(page.figures[label, "task_loss"]["data-value"])
                == model["scores"]["task_loss"]
            )
            if "verdict" in model:
                shown = page.figures[label, "task_gain"]
                assert [float(shown[f"data-{end}"]) for end in ("low", "high")] == [
                    model["total"]["task_gain"][end] for end in ("low", "high")
                ]
        assert "as version 1" in text and "champion is version" in text
        assert all(load.startswith("#") for load in page.loads)

    def test_a_second_run_trains_nothing_and_is_quick(self, place: Path) -> None:
        before, started = summary(place), time.monotonic()
        ended = lora(place, "run", "tiny.yaml")
        assert ended.returncode == 0, ended.stderr
        assert time.monotonic() - started < 60
        after = summary(place)
        assert all(entry["cached"] for entry in after["stages"] if entry["name"] != "register")
        assert after["models"] == before["models"]
        assert after["registered"] == before["registered"]

    def test_compare_prints_the_table_again(self, place: Path) -> None:
        ended = lora(place, "compare", "pairs_tiny_cpu")
        assert ended.returncode == 0, ended.stderr
        assert "rank-4" in ended.stdout and "control" in ended.stdout

    def test_a_registered_adapter_answers(self, place: Path) -> None:
        ended = lora(
            place,
            "generate",
            "--adapter",
            "models:/pairs-tiny/1",
            "--max-new-tokens",
            "4",
            "Say red 1.",
        )
        assert ended.returncode == 0, ended.stderr

    def test_an_adapter_meets_another_base(self, place: Path) -> None:
        other = save_tiny_model(place / "other", seed=1)
        folder = Path(summary(place)["models"]["rank-2"]["folder"]) / "adapter"
        ended = lora(
            place, "generate", "--adapter", str(folder), "--base", str(other), "Say red 1."
        )
        assert ended.returncode == 2
        assert "was trained on" in ended.stderr and "Traceback" not in ended.stderr

    def test_a_changed_file_is_made_again_and_a_dead_tracking_server_loses_nothing(
        self, place: Path
    ) -> None:
        weights = (
            Path(summary(place)["models"]["rank-2"]["folder"])
            / "adapter"
            / "adapter_model.safetensors"
        )
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        ended = lora(
            place,
            "run",
            "tiny.yaml",
            MLFLOW_TRACKING_URI="http://127.0.0.1:9",
            LORA_REGISTRY_SECONDS="1",
        )
        assert ended.returncode == 2
        assert "the adapters are kept" in ended.stderr and "Traceback" not in ended.stderr
        assert "rank-4" in ended.stdout
        assert [entry["name"] for entry in summary(place)["stages"] if not entry["cached"]] == [
            "train rank-2",
            "register",
        ]
        assert weights.read_bytes() == whole
        assert lora(place, "run", "tiny.yaml").returncode == 0
        assert summary(place)["registered"]["versions"] == {"rank-2": 1, "rank-4": 2}
