"""`lora init` writes a recipe that works as it is, or nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import save_pairs

from pipelines.config.recipe import load_recipe
from pipelines.errors import PipelineError, RecipeError
from pipelines.models.base_model import identify
from pipelines.models.base_tokenizer import base_tokenizer
from pipelines.paths import runs_root
from pipelines.workflow.init_recipe import NewRecipe, write_recipe
from pipelines.workflow.stages import Stages


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, shared_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_RUNS", str(shared_runs))
    return tmp_path


def test_the_recipe_fits_the_data_and_a_run_reuses_them(work: Path, tiny_folder: Path) -> None:
    (work / "data").mkdir()
    save_pairs(work / "data" / "pairs.jsonl")
    (work / "recipes").mkdir()
    output = Path("recipes/new.yaml")
    new = NewRecipe("data/pairs.jsonl", str(tiny_folder), output=output)
    written = write_recipe(new)
    recipe = load_recipe(written)
    assert recipe.name == "pairs"
    assert recipe.data.source == "../data/pairs.jsonl"
    assert recipe.base_model.id == str(tiny_folder.resolve())
    assert recipe.data.validation_examples == 8
    with base_tokenizer(identify(recipe.base_model.id, None)) as tokenizer:
        result = Stages(recipe, runs_root(), written.parent).data(tokenizer).result()
    assert result is not None
    assert result.lengths.percentile_99 <= recipe.data.max_tokens < result.lengths.longest + 32
    assert recipe.training.epochs == 3
    text = written.read_text()
    written.write_text("")
    write_recipe(replace(new, overwrite=True))
    assert written.read_text() == text


def test_an_existing_file_is_kept(work: Path, tiny_folder: Path) -> None:
    pairs = save_pairs(work / "pairs.jsonl")
    (work / "pairs.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"'pairs.yaml' exists; .*--force"):
        write_recipe(NewRecipe(pairs.name, str(tiny_folder)))
    assert (work / "pairs.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "reason"),
    [('{"prompt": "a"\n', "line 1"), ('{"a": 1}\n{"a": 2}\n', "'a'"), ("", "empty")],
    ids=["malformed", "unknown columns", "empty"],
)
def test_unreadable_data_are_refused_and_nothing_is_written(
    work: Path, tiny_folder: Path, content: str, reason: str
) -> None:
    (work / "rows.jsonl").write_text(content)
    with pytest.raises(PipelineError, match=reason):
        write_recipe(NewRecipe("rows.jsonl", str(tiny_folder)))
    assert [path.name for path in work.iterdir()] == ["rows.jsonl"]


def test_too_few_rows_are_refused_and_nothing_is_written(work: Path, tiny_folder: Path) -> None:
    rows = [{"prompt": f"q{number}", "completion": "a"} for number in range(3)]
    (work / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PipelineError, match="3 usable rows"):
        write_recipe(NewRecipe("few.jsonl", str(tiny_folder)))
    assert not (work / "few.yaml").exists()


def test_a_missing_file_is_refused_by_name(work: Path, tiny_folder: Path) -> None:
    with pytest.raises(PipelineError, match=r"missing\.jsonl"):
        write_recipe(NewRecipe("missing.jsonl", str(tiny_folder)))
    assert list(work.iterdir()) == []
