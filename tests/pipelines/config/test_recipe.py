"""A recipe is valid or rejected: each error names the key, the value or the file, and the fix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipelines.config.error_messages import RENAMED
from pipelines.config.recipe import RECIPES, Recipe, load_recipe, parse_recipe
from pipelines.errors import RecipeError

Values = dict[str, Any]
Maker = Callable[..., Values]
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Values], Path]:
    """Return a function that writes plain values to a recipe file."""

    def write(values: Values) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def refusal(values: Values) -> str:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(values)
    return str(refused.value)


def refusal_of_file(path: Path | str, *, ranks: list[int] | None = None) -> str:
    with pytest.raises(RecipeError) as refused:
        load_recipe(path, ranks=ranks)
    return str(refused.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_by_name_and_is_named_after_its_file(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_by_path(name: str) -> None:
    assert load_recipe(RECIPES / f"{name}.yaml") == load_recipe(name)


def test_optional_sections_have_defaults(recipe_with: Maker) -> None:
    values = {
        name: section
        for name, section in recipe_with().items()
        if name not in ("control", "launch", "evaluation")
    }
    recipe = parse_recipe(values)
    assert recipe.gate.min_gain_share == 0.5
    assert recipe.evaluation.general == (
        "hellaswag",
        "piqa",
        "arc_easy",
        "openbookqa",
        "winogrande",
        "lambada",
    )


def test_a_rate_in_scientific_notation_is_a_number(
    save: Callable[[Values], Path], recipe_with: Maker
) -> None:
    path = save(recipe_with())
    # YAML 1.1 reads 1e-3 as a string.
    text = path.read_text().replace("learning_rate: 0.01\n", "learning_rate: 1e-3\n")
    path.write_text(text)
    assert load_recipe(path).lora.learning_rate == 0.001


@pytest.mark.parametrize(
    ("changes", "key", "suggestion"),
    [
        ({"training": {"stepz": 3}}, "'training.stepz'", "did you mean 'steps'?"),
        ({"lora": {"learningrate": 0.1}}, "'lora.learningrate'", "did you mean 'learning_rate'?"),
        ({"evaluatoin": {}}, "'evaluatoin'", "did you mean 'evaluation'?"),
        (
            {"gate": {"xyzzy": 1}},
            "'gate.xyzzy'",
            "known here: max_drop_beyond_control, max_file_mb, max_general_drop",
        ),
        (
            {"qqq": 1},
            "'qqq'",
            "known here: base_model, control, data, evaluation, experiments, frontier, gate, "
            "launch, lora, name, registry, seed, training",
        ),
    ],
)
def test_an_unknown_key_is_rejected_with_a_suggestion(
    recipe_with: Maker, changes: Values, key: str, suggestion: str
) -> None:
    message = refusal(recipe_with(**changes))
    assert f"unknown key {key}" in message
    assert suggestion in message


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"lora": {"ranks": [0]}}, ["lora.ranks.0 = 0", "greater than or equal to 1"]),
        ({"lora": {"ranks": [4, -8]}}, ["lora.ranks.1 = -8", "greater than or equal to 1"]),
        ({"lora": {"ranks": [4, 8, 4]}}, ["lora.ranks", "[4, 8, 4]", "name each once"]),
        ({"lora": {"ranks": []}}, ["lora.ranks = []", "at least 1 item"]),
        ({"lora": {"ranks": 4}}, ["lora.ranks = 4"]),
        ({"lora": {"alpha": 0}}, ["lora.alpha = 0", "greater than 0"]),
        ({"lora": {"dropout": 1.0}}, ["lora.dropout = 1.0", "less than 1"]),
        ({"lora": {"learning_rate": 2}}, ["lora.learning_rate = 2", "less than 1"]),
        (
            {"lora": {"init": "zeros"}},
            [
                "lora.init is 'zeros'",
                "use kaiming, gaussian, orthogonal, olora, pissa, pissa_niter_N, eva, loftq",
            ],
        ),
        ({"training": {"steps": 0}}, ["training.steps = 0", "greater than or equal to 1"]),
        ({"training": {"steps": "many"}}, ["training.steps = 'many'", "valid integer"]),
        ({"training": {"warmup_steps": -1}}, ["training.warmup_steps = -1"]),
        ({"data": {"max_tokens": 7}}, ["data.max_tokens = 7", "greater than or equal to 8"]),
        (
            {"base_model": {"quantization": "int3"}},
            ["base_model.quantization = 'int3'", "'nf4' or 'none'"],
        ),
        ({"evaluation": {"general": ["piqqa"]}}, ["evaluation.general.0 = 'piqqa'", "'piqa'"]),
        (
            {"gate": {"min_gain_share": 1.5}},
            ["gate.min_gain_share = 1.5", "less than or equal to 1"],
        ),
        ({"registry": {"model": "team/model"}}, ["registry.model", "'team/model'", "no '/'"]),
        ({"registry": {"model": " "}}, ["registry.model", "' '"]),
        ({"name": "runs/one"}, ["name = 'runs/one'", "match pattern"]),
        ({"seed": "x"}, ["seed = 'x'", "valid integer"]),
        ({"lora": None}, ["lora = None", "valid dictionary"]),
    ],
)
def test_an_invalid_value_is_rejected_with_its_key(
    recipe_with: Maker, changes: Values, fragments: list[str]
) -> None:
    message = refusal(recipe_with(**changes))
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"lora": {"alpha": float("inf")}}, "lora.alpha"),
        ({"evaluation": {"general": []}}, "evaluation.general"),
        ({"evaluation": {"general": ["piqa", "piqa"]}}, "evaluation.general"),
        ({"evaluation": {"items_per_benchmark": 1}}, "evaluation.items_per_benchmark"),
        ({"data": {"validation_examples": 1}}, "data.validation_examples"),
    ],
    ids=["infinite alpha", "no benchmark", "a benchmark twice", "one item", "one held-out example"],
)
def test_settings_that_make_a_comparison_impossible_are_rejected(
    recipe_with: Maker, changes: Values, key: str
) -> None:
    """An interval needs two items of each kind; an error after training would waste the run."""
    assert key in refusal(recipe_with(**changes))


@pytest.mark.parametrize("section", ["name", "base_model", "data", "lora", "training", "registry"])
def test_a_missing_section_is_rejected(recipe_with: Maker, section: str) -> None:
    values = recipe_with()
    del values[section]
    assert f"{section} is missing; add it" in refusal(values)


def test_all_problems_are_reported_at_once(recipe_with: Maker) -> None:
    message = refusal(recipe_with(training={"steps": 0}, data={"max_tokens": 1}, name="a b"))
    for key in ("training.steps", "data.max_tokens", "name = "):
        assert key in message


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_key_is_rejected_with_its_new_name(
    recipe_with: Maker, old: str, new: str
) -> None:
    section, _, key = old.partition(".")
    assert refusal(recipe_with(**{section: {key: 1}})).endswith(
        f"unknown key {old!r}; it is now called {new!r}"
    )
    fields = Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    assert new.partition(".")[2] in fields


def test_a_batch_with_fewer_examples_than_micro_batches_is_rejected(recipe_with: Maker) -> None:
    message = refusal(
        recipe_with(
            training={"batch_size": 5, "gradient_accumulation_steps": 3}, launch={"processes": 2}
        )
    )
    assert "training.batch_size 5" in message
    assert "2 processes × 3 micro-batches" in message
    assert "at least 6" in message


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (
            {"training": {"steps": 6, "warmup_steps": 6}},
            ["training.warmup_steps 6", "training.steps 6", "at most 5"],
        ),
        (
            {"lora": {"init": "loftq"}, "base_model": {"quantization": "none"}},
            ["lora.init 'loftq'", "base_model.quantization 'none'"],
        ),
        (
            {"evaluation": {"generations": 9}},
            ["evaluation.generations 9", "data.validation_examples 8", "at most 8"],
        ),
    ],
    ids=["endless warmup", "nothing rounded", "more answers than prompts"],
)
def test_contradictory_settings_are_rejected(
    recipe_with: Maker, changes: Values, fragments: list[str]
) -> None:
    message = refusal(recipe_with(**changes))
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    "init",
    ["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "eva", "loftq"],
)
def test_every_initialization_is_accepted(recipe_with: Maker, init: str) -> None:
    assert parse_recipe(recipe_with(lora={"init": init})).lora.init == init


def test_generations_default_to_at_most_the_held_out_examples(recipe_with: Maker) -> None:
    recipe = parse_recipe(
        {name: section for name, section in recipe_with().items() if name != "evaluation"}
    )
    assert recipe.evaluation.generations == recipe.data.validation_examples == 8
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def test_a_rejected_item_is_the_only_problem_of_its_list(recipe_with: Maker) -> None:
    assert "at least 1 item" not in refusal(recipe_with(lora={"ranks": [0]}))


def test_one_example_per_micro_batch_is_enough(recipe_with: Maker) -> None:
    values = recipe_with(
        training={"batch_size": 6, "gradient_accumulation_steps": 3}, launch={"processes": 2}
    )
    assert parse_recipe(values).training.batch_size == 6


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"name: [unclosed\n", "is not valid YAML"),
        (b"a: b: c\n", "is not valid YAML"),
        (b"- name\n- other\n", "contains list"),
        (b"", "contains NoneType"),
        (b"just text\n", "contains str"),
        (b"name: \xff\xfe\n", "mine.yaml"),
    ],
    ids=["unclosed", "two colons", "a list", "empty", "text", "not UTF-8"],
)
def test_a_malformed_file_is_rejected_by_name(
    tmp_path: Path, content: bytes, fragment: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    message = refusal_of_file(path)
    assert str(path) in message
    assert fragment in message


def test_an_error_starts_with_the_file_name(
    save: Callable[[Values], Path], recipe_with: Maker
) -> None:
    path = save(recipe_with(training={"steps": 0}))
    assert refusal_of_file(path).startswith(f"{path}: ")


def test_a_missing_recipe_is_rejected_with_a_similar_name() -> None:
    message = refusal_of_file(SHIPPED[0][:-1])
    assert repr(SHIPPED[0][:-1]) in message
    assert f"did you mean {SHIPPED[0]}?" in message


def test_a_missing_recipe_without_a_similar_name_lists_all(tmp_path: Path) -> None:
    message = refusal_of_file(tmp_path / "zz.yaml")
    assert "does not exist" in message
    assert all(name in message for name in SHIPPED)


def test_ranks_as_an_argument_replace_those_of_the_recipe(
    save: Callable[[Values], Path], recipe_with: Maker
) -> None:
    path = save(recipe_with())
    assert load_recipe(path, ranks=[16]).lora.ranks == (16,)
    assert load_recipe(path, ranks=[16]).lora.alpha == load_recipe(path).lora.alpha


@pytest.mark.parametrize("ranks", [None, []])
def test_no_ranks_as_an_argument_keep_those_of_the_recipe(
    save: Callable[[Values], Path], recipe_with: Maker, ranks: list[int] | None
) -> None:
    assert load_recipe(save(recipe_with()), ranks=ranks).lora.ranks == (2, 4)


def test_ranks_as_an_argument_follow_the_same_rules(
    save: Callable[[Values], Path], recipe_with: Maker
) -> None:
    assert "lora.ranks.0 = 0" in refusal_of_file(save(recipe_with()), ranks=[0])


@pytest.mark.parametrize("section", [None, [], "text"], ids=["empty", "a list", "text"])
def test_ranks_as_an_argument_with_a_malformed_section_are_rejected(
    save: Callable[[Values], Path], recipe_with: Maker, section: Any
) -> None:
    assert "lora" in refusal_of_file(save({**recipe_with(), "lora": section}), ranks=[4])


def test_a_loaded_recipe_cannot_be_changed(recipe_with: Maker) -> None:
    recipe = parse_recipe(recipe_with())
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 8
    with pytest.raises(ValidationError, match="frozen"):
        recipe.lora.alpha = 1


def test_dumped_values_load_to_the_same_recipe(recipe_with: Maker) -> None:
    recipe = parse_recipe(recipe_with())
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123abc"])
def test_code_of_a_hub_model_needs_a_commit(recipe_with: Maker, revision: str | None) -> None:
    section = {"id": "owner/name", "trust_remote_code": True, "revision": revision}
    with pytest.raises(
        RecipeError,
        match=r"trust_remote_code and revision .* set revision to the 40 digits of the commit",
    ):
        parse_recipe(recipe_with(base_model=section))


def test_code_at_a_commit_or_in_a_folder_is_accepted(recipe_with: Maker) -> None:
    for section in (
        {"id": "owner/name", "revision": "0123456789abcdef" * 2 + "01234567"},
        {"id": "./models/own"},
    ):
        section = {**section, "trust_remote_code": True}
        assert parse_recipe(recipe_with(base_model=section)).base_model.trust_remote_code
