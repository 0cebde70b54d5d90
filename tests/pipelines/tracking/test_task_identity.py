"""A registered champion is compared only with adapters of the same task."""

from pathlib import Path
from typing import Any

import pytest
from registered import copied, register
from summaries import Summary, parsed

from pipelines.config.recipe import Recipe
from pipelines.tracking.tag_names import stored_name
from pipelines.tracking.task_identity import task_objection, task_tags
from pipelines.workflow.champion import Champion, find_champion
from pipelines.workflow.run import PipelineRun
from pipelines.workflow.stages import Stages

mlflow = pytest.importorskip("mlflow")
pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_store")]
OTHER_TASKS = [
    ("data", {"source": "other.jsonl"}, "data source"),
    ("data", {"group_column": "topic"}, "group column"),
    ("data", {"validation_examples": 32}, "held-out examples"),
    ("data", {"supervise": "all"}, "format of the examples"),
    ("evaluation", {"metrics": ["chrf"]}, "evaluation settings"),
]
SAME_TASK = [
    ("data", {"revision": "of another day"}),
    ("evaluation", {"execute_seconds": 99.0}),
    ("lora", {"alpha": 8.0}),
    ("training", {"steps": 99}),
]


def changed(comparison: Summary, section: str, settings: dict[str, Any]) -> Summary:
    """Return the comparison of a recipe with other settings."""
    found = copied(comparison)
    found["recipe"][section] |= settings
    return found


def recipe_of(comparison: Summary) -> Recipe:
    return parsed(comparison).recipe


def champion(comparison: Summary, runs: Path) -> Champion | None:
    """Return the champion that a run finds which has trained other adapters."""
    summary = parsed(comparison)
    run = PipelineRun(summary.recipe, Stages(summary.recipe, runs))
    return find_champion(run, summary.base, summary.data, [])


@pytest.mark.parametrize(("section", "settings", "name"), OTHER_TASKS)
def test_version_of_another_task_is_not_compared(
    comparison: Summary, section: str, settings: dict[str, Any], name: str
) -> None:
    tags = task_tags(recipe_of(comparison))
    objection = task_objection(recipe_of(changed(comparison, section, settings)), tags)
    assert objection is not None
    assert f"its {name} is" in objection
    assert "give each task its own registry.model" in objection


@pytest.mark.parametrize(("section", "settings"), SAME_TASK)
def test_version_of_the_same_task_is_compared(
    comparison: Summary, section: str, settings: dict[str, Any]
) -> None:
    tags = task_tags(recipe_of(comparison))
    assert task_objection(recipe_of(changed(comparison, section, settings)), tags) is None


def test_champion_of_another_task_has_an_objection(comparison: Summary, runs: Path) -> None:
    register(comparison, runs)
    same = champion(comparison, runs)
    assert same is not None
    assert same.objection is None
    assert same.model is not None
    other = champion(changed(comparison, "data", {"source": "other.jsonl"}), runs)
    assert other is not None
    assert other.model is None
    assert "its data source is" in str(other.objection)
    assert "other.jsonl" in str(other.objection)


def test_champion_without_a_recorded_task_has_an_objection(comparison: Summary, runs: Path) -> None:
    version = register(comparison, runs).aliases["champion"]
    client = mlflow.MlflowClient()
    client.delete_model_version_tag(comparison["name"], str(version), stored_name("task.source"))
    found = champion(comparison, runs)
    assert found is not None
    assert "does not record its data source" in str(found.objection)
    register(comparison, runs)
    found = champion(comparison, runs)
    assert found is not None
    assert found.objection is None


def test_champion_that_a_user_chose_is_the_one_to_beat(comparison: Summary, runs: Path) -> None:
    register(comparison, runs)
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(comparison["name"], "champion", "1")
    found = champion(comparison, runs)
    assert found is not None
    assert found.version == "1"
    assert found.model is not None
