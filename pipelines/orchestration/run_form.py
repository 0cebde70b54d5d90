"""The form with which a person starts a run on a deployment's page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect.utilities.callables import ParameterSchema

from pipelines.config.recipe import RECIPES, load_recipe
from pipelines.errors import RecipeError

DEFAULTS: dict[str, Any] = {
    "ranks": [],
    "steps": 0,
    "data": "",
    "promote": "as in the recipe",
    "only_if_changed": False,
}
"""What a run without parameters does: everything as in the recipe."""


def form(schema: ParameterSchema, recipe: str) -> dict[str, Any]:
    """Return the parameters as JSON schema, in which the recipe is chosen from a list.

    Args:
        schema: of the flow.
        recipe: the deployment's own, which comes first.
    """
    values: dict[str, Any] = schema.model_dump(exclude_unset=True)
    values["properties"]["recipe"] |= {"enum": recipes(recipe), "default": recipe}
    return values


def recipes(own: str) -> list[str]:
    """Return a recipe, the other valid ones in its folder, and those that are included."""
    found = [own]
    path = Path(own)
    if path.is_absolute():
        found += [str(file) for file in _valid_recipes(path.parent)]
    found += [file.stem for file in _valid_recipes(RECIPES)]
    return list(dict.fromkeys(found))


def _valid_recipes(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.glob("*.yaml")):
        try:
            load_recipe(file)
        except (RecipeError, OSError):  # another YAML file
            continue
        yield file
