"""A deployment's page has a form for a run: recipe, ranks, steps, data, promotion."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.utilities.callables import parameter_schema

from pipelines.config.recipe import RECIPES, load_recipe
from pipelines.errors import RecipeError
from pipelines.orchestration.run_form import DEFAULTS, form
from pipelines.workflow.flows import finetune


@pytest.fixture
def file(tmp_path: Path, recipe_with: Callable[..., dict[str, Any]]) -> Path:
    """A recipe that trains for two epochs, in a folder with another and with another YAML file."""
    values = recipe_with(training={"epochs": 2, "batch_size": 8})
    values["training"].pop("steps", None)
    for name in ("own", "other"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "compose.yaml").write_text("services: {}")
    return tmp_path / "own.yaml"


def test_the_form_has_a_list_of_recipes_and_plain_fields(file: Path) -> None:
    fields = form(parameter_schema(finetune), str(file))["properties"]
    assert fields["recipe"]["enum"][:2] == [str(file), str(file.with_name("other.yaml"))]
    included = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
    assert fields["recipe"]["enum"][2:] == included
    assert fields["ranks"]["items"] == {"type": "integer"}
    assert fields["steps"]["type"] == "integer"
    assert fields["data"]["type"] == "string"
    assert fields["promote"]["enum"] == ["as in the recipe", "auto", "propose"]
    assert all(field["description"] for field in fields.values())


def test_a_run_without_parameters_changes_nothing(file: Path) -> None:
    parameters = inspect.signature(finetune.fn).parameters
    defaults = {name: one.default for name, one in parameters.items() if name != "recipe"}
    assert defaults == DEFAULTS


def test_steps_and_promotion_replace_those_of_the_recipe(file: Path) -> None:
    plain = load_recipe(file)
    assert (plain.training.epochs, plain.registry.promote) == (2, "auto")
    changed = load_recipe(file, steps=30, promote="propose")
    assert (changed.training.steps, changed.training.epochs) == (30, None)
    assert changed.registry.promote == "propose"
    assert load_recipe(file, steps=0, promote="") == plain
    with pytest.raises(RecipeError, match=r"training\.steps"):
        load_recipe(file, steps=-1)


def test_the_description_is_for_users() -> None:
    assert "Start reading here" not in (finetune.description or "")
    assert "registers the adapters that pass" in (finetune.description or "")
