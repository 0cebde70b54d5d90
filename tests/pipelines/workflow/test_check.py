"""`lora check` prepares the data, prints what would be learned, and loads no model."""

import json
from pathlib import Path

import pytest
import yaml
from command import lora
from tiny import save_tiny_model, tiny_recipe

QUESTIONS = 120
COPIES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its rows, one of which is a question of the evaluation."""
    folder = tmp_path_factory.mktemp("check")
    question = "Which of the nine small boxes on the shelf near the door is the heaviest one?"
    probe = {"prompt": question, "choices": [" Box nine.", " Box one."], "gold": 0}
    (folder / "probes.jsonl").write_text(f"{json.dumps(probe)}\n" * 2)
    rows = [
        {"question": f"Which color has box {i}?", "answer": f"Box {i} is red.", "id": i}
        for i in range(QUESTIONS)
    ]
    for i in range(QUESTIONS, QUESTIONS + COPIES):  # of which most are trained on
        rows.append({"question": f"{i}. {question}", "answer": "Box nine.", "id": i})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(save_tiny_model(folder / "model"), Path("rows.jsonl"))
    recipe["evaluation"] |= {"general": [], "probes": ["probes.jsonl"]}
    recipe["data"] = {"source": "rows.jsonl", "validation_examples": 8, "max_tokens": 128}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_it_shows_sources_examples_and_warnings(folder: Path) -> None:
    ended = lora(folder, "check", "recipe.yaml")
    assert ended.returncode == 0, ended.stderr
    text = " ".join(ended.stdout.split())
    assert f"rows.jsonl: {QUESTIONS + COPIES} rows (json lines, utf-8)" in text
    assert "read as question/answer; columns used: question, answer; not used: id" in text
    assert "Training example 1: supervised and prompt" in text
    assert "2 items of probes are in the training data" in text
    assert {path.name for path in (folder / "runs").iterdir()} >= {"data", "check"}
    assert not (folder / "runs" / "base").exists()
    assert not (folder / "runs" / "train").exists()


def test_bad_rows_are_an_error_in_one_sentence(folder: Path) -> None:
    rows = (folder / "rows.jsonl").read_text().splitlines()
    rows[6] = json.dumps({"question": "Which color?", "answer": 7, "id": 6})
    (folder / "bad.jsonl").write_text("\n".join(rows))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"]["source"] = "bad.jsonl"
    (folder / "bad.yaml").write_text(yaml.safe_dump(recipe))
    ended = lora(folder, "check", "bad.yaml")
    assert ended.returncode == 2
    assert "error: line 7 of 'bad.jsonl' has 7 as its completion" in ended.stderr
    assert "Traceback" not in ended.stderr
