"""A check compares what a run would read with the last completed run of the same ranks."""

from pathlib import Path

import pytest
import yaml
from tiny import save_pairs, tiny_recipe

from pipelines.config.recipe import load_recipe
from pipelines.errors import RecipeError
from pipelines.workflow.completed import (
    completed_run,
    current_inputs_digest,
    inputs_digest,
    record_completed,
)
from pipelines.workflow.named_sources import NamedSources
from pipelines.workflow.run import PipelineRun
from pipelines.workflow.stages import Stages, content_digest


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Return a recipe's file; its data are next to it."""
    pairs = save_pairs(tmp_path / "pairs.jsonl")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path / "model", pairs)))
    return path


def run_of(recipe: Path, *ranks: int, data: str = "") -> PipelineRun:
    settings = load_recipe(recipe, ranks=list(ranks), data=data)
    return PipelineRun(settings, Stages(settings, recipe.parent / "runs", recipe.parent))


def test_the_digest_changes_with_recipe_and_data_only(recipe: Path) -> None:
    before = current_inputs_digest(run_of(recipe))
    assert current_inputs_digest(run_of(recipe)) == before
    assert current_inputs_digest(run_of(recipe, 2)) != before
    text = recipe.read_text()
    recipe.write_text(text + "seed: 8\n")
    assert current_inputs_digest(run_of(recipe)) != before
    recipe.write_text(text)
    pairs = recipe.parent / "pairs.jsonl"
    pairs.write_text(pairs.read_text() + '{"prompt": "new", "completion": "row"}\n')
    assert current_inputs_digest(run_of(recipe)) != before


def test_the_digest_of_a_completed_run_is_of_the_files_that_it_read(recipe: Path) -> None:
    """A probe that is edited while the run is in progress differs from the one that was scored."""
    probe = recipe.parent / "probe.jsonl"
    probe.write_text('{"question": "?", "choices": ["a", "b"], "answer": 0}\n')
    values = yaml.safe_load(recipe.read_text())
    values["evaluation"] = {**values.get("evaluation", {}), "probes": ["probe.jsonl"]}
    recipe.write_text(yaml.safe_dump(values))
    run = run_of(recipe)
    sources = NamedSources.of(run.recipe.data, run.stages.search_folders).identities
    files = {"probe.jsonl": content_digest(probe)}
    completed = inputs_digest(run.recipe, sources=sources, files=files)
    assert current_inputs_digest(run) == completed
    probe.write_text(probe.read_text() * 2)
    assert current_inputs_digest(run) != completed


def test_each_choice_of_ranks_has_its_last_run(recipe: Path) -> None:
    assert completed_run(run_of(recipe)) is None
    record_completed(run_of(recipe), "weekly inputs", "weekly")
    record_completed(run_of(recipe, 2), "nightly inputs", "nightly")
    both = [completed_run(run_of(recipe)), completed_run(run_of(recipe, 2))]
    assert [run and run.inputs for run in both] == ["weekly inputs", "nightly inputs"]


def test_an_unreadable_record_counts_as_none(recipe: Path) -> None:
    run = run_of(recipe, 2)
    record_completed(run, "inputs", "nightly")
    (run.folder / "completed" / "ranks-2.json").write_text("{")
    assert completed_run(run) is None


def test_an_event_replaces_the_source_but_not_several(recipe: Path) -> None:
    assert run_of(recipe, data="other.jsonl").recipe.data.source == "other.jsonl"
    values = yaml.safe_load(recipe.read_text())
    values["data"] = {"sources": [{"source": "a.jsonl"}, {"source": "b.jsonl"}]}
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match="would replace the several sources"):
        run_of(recipe, data="other.jsonl")
