"""The recipe reference in pipelines/recipes/README.md is the one that the models produce."""

from pathlib import Path

import pytest

from pipelines.config.recipe import RECIPES, load_recipe
from pipelines.config.reference import BEGIN, END, reference
from pipelines.runtime.launcher import config_file

README = RECIPES / "README.md"


def test_the_readme_contains_the_current_reference() -> None:
    text = README.read_text(encoding="utf-8")
    start = text.index(BEGIN)
    end = text.index(END) + len(END)
    assert text[start:end] == reference(), "run `python -m pipelines.config.reference`"


def test_every_key_is_described() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert [row for row in rows if row.endswith("|  |")] == []


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_included_recipe_is_valid_and_listed(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert config_file(recipe.launch.config).is_file()
    assert f"`{file.name}`" in README.read_text(encoding="utf-8")
