"""Invalid names of registered models are refused when the recipe is loaded."""

import pytest
from summaries import Summary
from summary_parts import recipe

from pipelines.config.recipe import parse_recipe
from pipelines.errors import RecipeError

INVALID = {
    "..": r"'\.\.'",
    "a..b": r"'a\.\.b'",
    "a/b": "has '/'",
    "a:b": "has ':'",
    "a@b": "has '@'",
    "a\tb": "a control character",
    "a\nb": "a control character",
    "a\x00b": "a control character",
    "a\u200bb": "a control character",
    "": "an empty name",
    " a": "spaces at its ends",
    "a" * 257: "257 characters",
    "'\"": "both kinds of quotes",
}
VALID = ["a", "a" * 256, "team_a-Support.v2", "it's 50% of |é| <b>", "名前"]


def with_name(name: str) -> Summary:
    values = recipe([16])
    values["registry"]["model"] = name
    return values


@pytest.mark.parametrize("name", INVALID)
def test_invalid_name_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(RecipeError, match=INVALID[name]) as found:
        parse_recipe(with_name(name))
    assert "use letters, digits" in str(found.value)


@pytest.mark.parametrize("name", VALID)
def test_other_names_are_accepted(name: str) -> None:
    assert parse_recipe(with_name(name)).registry.model == name
