"""Mistakes in the data section of a recipe are answered with what to write instead."""

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe

from pipelines.config.recipe import parse_recipe
from pipelines.errors import RecipeError


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(values)
    return str(refused.value)


def recipe(**changes: Any) -> dict[str, Any]:
    return tiny_recipe(Path("base"), Path("rows.jsonl"), **changes)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"sources": ["a.jsonl"]},
            "data.sources.0 = 'a.jsonl': input should be a valid dictionary, such as "
            "{source: a.jsonl}",
        ),
        ([{"path": "a.jsonl"}], "write the list under data.sources"),
        ({"sources": [{"path": "a.jsonl"}]}, "'data.sources.0.path'; use data.sources.0.source"),
        ({"source": "a.jsonl", "type": "alpaca"}, "named in data.columns; remove it"),
        ({"source": "a.jsonl", "streaming": True}, "rows are stored on disk"),
        ({"source": "a.jsonl", "template": "llama3"}, "use data.chat_template"),
        ({"source": "a.jsonl", "val_size": 0.1}, "use data.validation_examples"),
        ({"source": "a.jsonl", "mask_history": True}, "use data.supervise (assistant, last or"),
    ],
)
def test_a_mistake_in_the_data_is_answered_with_the_fix(data: Any, expected: str) -> None:
    assert expected in refusal({**recipe(), "data": data})


def test_one_value_instead_of_a_list_is_answered_with_a_list() -> None:
    assert "lora.ranks = 8: input should be a list, such as [8]" in refusal(
        recipe(lora={"ranks": 8})
    )
