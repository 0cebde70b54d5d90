"""A complete run that searches a grid on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import lora
from tiny import save_pairs, save_tiny_model, tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.server]
LABELS = ["rank-2 lr 0.001", "rank-2 lr 0.01", "rank-2 lr 0.9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe and its completed run."""
    folder = tmp_path_factory.mktemp("grid")
    save_pairs(folder / "pairs.jsonl", 200)
    recipe = tiny_recipe(save_tiny_model(folder / "model"), Path("pairs.jsonl"))
    recipe |= {"name": "grid", "control": {"method": "none"}}
    recipe["lora"] = {"alpha": 8}
    recipe["experiments"] = {"ranks": [2], "learning_rates": [0.001, 0.01, 0.9]}
    recipe["training"] |= {"steps": 8, "max_grad_norm": 100}
    (folder / "grid.yaml").write_text(yaml.safe_dump(recipe))
    ended = lora(folder, "run", "grid.yaml")
    assert ended.returncode == 0, ended.stderr
    return folder


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "runs" / "grid" / "summary.json").read_text())
    return values


def test_only_the_survivor_is_trained_to_the_end_and_compared(folder: Path) -> None:
    values = summary(folder)
    grid = values["grid"]
    assert list(grid["experiments"]) == LABELS
    assert [rung["step"] for rung in grid["rungs"]] == [3, 4]
    (survivor,) = (one["label"] for one in grid["rungs"][-1]["trials"] if one["continues"])
    assert [label for label in values["models"] if label.startswith("rank")] == [survivor]
    assert values["models"][survivor]["training"]["adapter"] == grid["experiments"][survivor]
    assert values["models"][survivor]["training"]["result"]["totals"]["steps"] == 8


def test_the_page_shows_every_halving(folder: Path) -> None:
    page = (folder / "runs" / "grid" / "report.html").read_text()
    for rung in summary(folder)["grid"]["rungs"]:
        assert f"Step {rung['step']} of 8" in page
        for trial in rung["trials"]:
            assert f'data-value="{trial["tuning_loss"]}"' in page
    assert "remains: by successive halving" in page


def test_no_checkpoint_is_left(folder: Path) -> None:
    assert not list((folder / "runs" / "train").glob("*/checkpoints"))
