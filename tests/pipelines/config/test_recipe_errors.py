"""Keys that are repeated, misplaced or from another tool are refused with the right one."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.error_messages import MAIN_KEYS
from pipelines.config.other_names import DERIVED, KEY_OF, NAMES, NOTES, REASON_OF
from pipelines.config.recipe import Recipe, load_recipe, parse_recipe
from pipelines.config.yaml_loading import read_yaml
from pipelines.errors import RecipeError

Values = dict[str, Any]
Maker = Callable[..., Values]


def refusal(values: Values) -> str:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(values)
    return str(refused.value)


def refusal_of_text(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as refused:
        load_recipe(file)
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\nseed: 1\nname: b\n", "key 'name' is on line 1 and again on line 3; keep one"),
        (
            "lora:\n  alpha: 1\n  ranks: [2]\n  alpha: 2\n",
            "key 'lora.alpha' is on line 2 and again on line 4",
        ),
        ("lora: {alpha: 1, 'alpha': 2}\n", "key 'lora.alpha' is on line 1 and again on line 1"),
        (
            "data:\n  sources:\n  - source: a\n  - source: b\n    source: c\n",
            "key 'data.sources.1.source' is on line 4 and again on line 5",
        ),
        (
            "lora:\n  ranks: [4]\ntraining: {steps: 3}\nlora:\n  alpha: 8\n",
            "key 'lora' is on line 1 and again on line 4",
        ),
    ],
    ids=["top level", "nested", "quoted", "in a list", "a section"],
)
def test_a_repeated_key_is_refused_with_both_lines(tmp_path: Path, text: str, problem: str) -> None:
    message = refusal_of_text(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'mine.yaml'}: ")
    assert problem in message


def test_all_repeated_keys_are_reported_at_once(tmp_path: Path) -> None:
    message = refusal_of_text(tmp_path, "name: a\nname: b\nname: c\nlora: {alpha: 1, alpha: 2}\n")
    assert message.count("key 'name'") == 2
    assert message.count("key 'lora.alpha'") == 1


def test_anchors_and_merged_mappings_are_not_repetitions(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: [*a, *b], z: 4}\nd: *b\n")
    assert read_yaml(file)["b"] == read_yaml(file)["d"] == {"x": 3, "y": 2}
    assert read_yaml(file)["c"] == {"x": 1, "y": 2, "z": 4}


def test_a_mapping_that_contains_itself_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("a: &a\n  inner: *a\n")
    assert read_yaml(file)["a"]["inner"]["inner"] is not None


def test_a_repetition_in_an_anchored_mapping_is_reported_once(tmp_path: Path) -> None:
    text = "lora: &a {alpha: 1, alpha: 2}\ncontrol: *a\n"
    assert refusal_of_text(tmp_path, text).count("again on line") == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_train_epochs": 3}, "unknown key 'num_train_epochs'; use training.epochs"),
        (
            {"training": {"num_epochs": 3}},
            "unknown key 'training.num_epochs'; use training.epochs",
        ),
        ({"data": {"max_seq_length": 9}}, "'data.max_seq_length'; use data.max_tokens"),
        ({"lora": {"r": 8}}, "unknown key 'lora.r'; use lora.ranks"),
        ({"lora": {"lora_alpha": 8}}, "unknown key 'lora.lora_alpha'; use lora.alpha"),
        (
            {"val_set_size": 0.1},
            "use data.validation_examples or data.validation_source",
        ),
        (
            {"per_device_train_batch_size": 4},
            "use training.batch_size (examples per step over all processes)",
        ),
        ({"Max-Steps": 4}, "unknown key 'Max-Steps'; use training.steps"),
        ({"control": {"lr": 1e-4}}, "unknown key 'control.lr'; use control.learning_rate"),
        ({"lr": 1e-4}, "unknown key 'lr'; use lora.learning_rate"),
        ({"bf16": True}, "unknown key 'bf16'; the dtype follows from the hardware; remove it"),
        ({"output_dir": "x"}, "LORA_RUNS"),
        ({"base_model": {"load_in_4bit": True}}, "use base_model.quantization (nf4 for 4 bits"),
    ],
)
def test_a_name_of_another_tool_is_answered_with_the_key_of_the_recipe(
    recipe_with: Maker, changes: Values, expected: str
) -> None:
    assert expected in refusal(recipe_with(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora": {"steps": 5}}, "unknown key 'lora.steps'; use training.steps"),
        ({"max_tokens": 64}, "unknown key 'max_tokens'; use data.max_tokens"),
        (
            {"training": {"learning_rate": 0.1}},
            "use lora.learning_rate or control.learning_rate",
        ),
        ({"gate": {"include_path": "x"}}, "use evaluation.lm_eval.include_path"),
        ({"launch": {"seed": 3}}, "unknown key 'launch.seed'; use seed"),
    ],
)
def test_a_key_in_the_wrong_section_is_answered_with_its_section(
    recipe_with: Maker, changes: Values, expected: str
) -> None:
    assert expected in refusal(recipe_with(**changes))


def test_an_unknown_key_of_a_section_in_a_section_is_reported(recipe_with: Maker) -> None:
    message = refusal(recipe_with(evaluation={"lm_eval": {"tasks": ["x"], "taks": 1}}))
    assert "unknown key 'evaluation.lm_eval.taks'; did you mean 'tasks'?" in message


def test_an_unknown_key_of_a_source_in_a_list_is_reported(recipe_with: Maker) -> None:
    values = recipe_with()
    values["data"] = {"sources": [{"source": "a.jsonl", "wieght": 2, "dataset": "x"}]}
    message = refusal(values)
    assert "unknown key 'data.sources.0.wieght'; did you mean 'weight'?" in message
    assert "unknown key 'data.sources.0.dataset'; use data.sources.0.source" in message


def test_an_unknown_column_is_reported_with_the_known_ones(recipe_with: Maker) -> None:
    message = refusal(recipe_with(data={"columns": {"instruction": "q"}}))
    assert "unknown key 'data.columns.instruction'; input should be 'text', 'prompt'" in message


@pytest.mark.parametrize(("section", "key"), MAIN_KEYS.items())
def test_a_section_that_is_a_text_is_answered_with_its_main_key(
    recipe_with: Maker, section: str, key: str
) -> None:
    message = refusal({**recipe_with(), section: "Qwen/Qwen2.5-0.5B"})
    assert f"{section} = 'Qwen/Qwen2.5-0.5B'" in message
    assert f"use {key}" in message


def recipe_keys() -> set[str]:
    sections = Recipe.model_json_schema()["$defs"]
    keys = set(Recipe.model_fields)
    for name, field in Recipe.model_fields.items():
        section = getattr(field.annotation, "__name__", "")
        properties = sections.get(section, {}).get("properties", {})
        keys |= {f"{name}.{key}" for key in properties}
    return keys


def test_every_key_that_a_message_names_exists() -> None:
    named = {key for keys in (*NAMES, *MAIN_KEYS.values()) for key in keys.split(" or ")}
    for reason in DERIVED:
        named |= set(re.findall(r"\b[a-z_]+\.[a-z_]+\b", reason))
    assert named <= recipe_keys(), named - recipe_keys()
    assert set(NOTES) <= set(NAMES)


def test_a_name_of_another_tool_has_one_answer_and_is_not_a_key() -> None:
    listed = [name for names in (*NAMES.values(), *DERIVED.values()) for name in names]
    assert len(listed) == len(set(listed)) == len(KEY_OF) + len(REASON_OF)
    top_level = {key for key in recipe_keys() if "." not in key}
    assert not set(listed) & top_level


def test_a_template_argument_that_is_true_or_false_as_text_is_refused(
    recipe_with: Callable[..., dict[str, Any]],
) -> None:
    values = recipe_with(data={"template_arguments": {"enable_thinking": "False"}})
    with pytest.raises(RecipeError, match=r"has the text 'False' as template_arguments.enable"):
        parse_recipe(values)
