"""A grid of experiments in a recipe: combinations, halvings, and settings without effect."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_recipe

from pipelines.config.experiments import grid_experiments, target_variants
from pipelines.config.halving import Rung, rungs
from pipelines.config.recipe import Recipe, load_recipe, parse_recipe
from pipelines.errors import RecipeError

GRID = {"ranks": [2, 8], "learning_rates": [1e-3, 1e-2], "targets": ["all-linear", ["q_proj"]]}


def recipe(experiments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    values = tiny_recipe(Path("base"), Path("rows.jsonl"))
    values["lora"] = {"alpha": 8, **changes.pop("lora", {})}
    return {**values, "experiments": experiments, **changes}


def refusal(experiments: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(recipe(experiments, **changes))
    return str(refused.value)


def test_a_grid_is_every_combination_of_its_lists() -> None:
    found = grid_experiments(parse_recipe(recipe(GRID)))
    assert [one.label for one in found] == [
        "rank-2 lr 0.001 all-linear",
        "rank-2 lr 0.001 q_proj",
        "rank-2 lr 0.01 all-linear",
        "rank-2 lr 0.01 q_proj",
        "rank-8 lr 0.001 all-linear",
        "rank-8 lr 0.001 q_proj",
        "rank-8 lr 0.01 all-linear",
        "rank-8 lr 0.01 q_proj",
    ]
    assert {one.rank for one in found} == {2, 8}
    assert [one.target_modules for one in found[:2]] == ["all-linear", ("q_proj",)]


def test_a_label_names_only_what_differs() -> None:
    found = grid_experiments(parse_recipe(recipe({"ranks": [2, 8]})))
    assert [one.label for one in found] == ["rank-2", "rank-8"]
    long = ["all-linear", r".*\.layers\.[0-3]\..*(q|v)_proj"]
    values = recipe({"targets": long}, lora={"ranks": [2]})
    labels = [one.label for one in grid_experiments(parse_recipe(values))]
    assert labels == ["rank-2 all-linear", "rank-2 targets-2"]


def test_no_two_experiments_have_the_same_label() -> None:
    targets = ["q_proj+v_proj", ["q_proj", "v_proj"]]
    rates = [1e-3, 1.0000001e-3]
    values = recipe({"ranks": [2], "targets": targets, "learning_rates": rates})
    labels = [one.label for one in grid_experiments(parse_recipe(values))]
    assert len(set(labels)) == 4
    assert labels[0] == "rank-2 lr 0.001 targets-1"


@pytest.mark.parametrize("lora", [None, {}])
def test_a_lora_section_without_settings_may_be_empty(lora: dict[str, Any] | None) -> None:
    assert parse_recipe({**recipe({"ranks": [2, 4]}), "lora": lora}).lora.ranks == (2, 4)


def test_a_recipe_with_a_grid_survives_a_round_trip() -> None:
    loaded = parse_recipe(recipe(GRID))
    again = Recipe.model_validate(yaml.safe_load(yaml.safe_dump(loaded.model_dump(mode="json"))))
    assert again == loaded


def test_each_choice_of_targets_is_a_variant() -> None:
    variants = target_variants(parse_recipe(recipe(GRID)))
    assert [one.lora.target_modules for one in variants] == ["all-linear", ("q_proj",)]
    without = parse_recipe(tiny_recipe(Path("base"), Path("rows.jsonl")))
    assert target_variants(without) == [without]
    assert grid_experiments(without) == []


def test_ranks_of_the_command_line_replace_those_of_the_grid(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(recipe(GRID)))
    loaded = load_recipe(path, ranks=[16])
    assert loaded.experiments.ranks == loaded.lora.ranks == (16,)
    path.write_text(yaml.safe_dump({**recipe(GRID), "lora": None}))
    assert load_recipe(path, ranks=[16]).lora.ranks == (16,)


@pytest.mark.parametrize(
    ("experiments", "changes", "message"),
    [
        ({"survivors": 2}, {"lora": {"ranks": [2]}}, "survivors 2 has no effect without a grid"),
        ({"ranks": [2]}, {}, "1 combinations and survivors 1, so nothing would be searched"),
        ({"ranks": [2, 4], "survivors": 2}, {}, "nothing would be searched"),
        ({"ranks": [2, 4]}, {"lora": {"ranks": [8]}}, r"remove lora.ranks"),
        (
            {"ranks": [2, 4], "learning_rates": [1e-3, 1e-2]},
            {"lora": {"learning_rate": 0.5}},
            "remove lora.learning_rate",
        ),
        (
            {"ranks": [2, 4], "targets": ["all-linear"]},
            {"lora": {"target_modules": ["q_proj"]}},
            "remove lora.target_modules",
        ),
        ({"ranks": [2], "targets": ["q_proj", "v_proj"]}, {}, "such as [[q_proj]]"),
        ({"ranks": [2], "targets": [["a", "b"], ["b", "a"]]}, {}, "has duplicates"),
        ({"ranks": [2, 4]}, {"gate": {"max_rank": 2}}, "gate.max_rank 2 rejects"),
        (
            {"ranks": [2], "learning_rates": [1e-3, 1e-2]},
            {"lora": {"learning_rate": 1e-2}},
            "remove lora.learning_rate",
        ),
        ({"ranks": [2, 4]}, {"frontier": {"cuts": [1]}}, "frontier.cuts is set next to a grid"),
        (
            {"ranks": [2, 4]},
            {"frontier": {"learning_rates": [0.5]}},
            "frontier.learning_rates is set next to a grid",
        ),
        ({"ranks": [2, 4]}, {"training": {"steps": 3}}, "use at least 4 steps"),
        ({"ranks": [2, 2]}, {}, "has duplicates"),
        ({"rank": [2, 4]}, {"lora": {"ranks": [2]}}, "experiments.rank"),
    ],
)
def test_a_setting_without_effect_is_refused(
    experiments: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    assert message in refusal(experiments, **changes)


@pytest.mark.parametrize(
    ("experiments", "survivors", "steps", "expected"),
    [
        (8, 1, 64, [(8, 4), (16, 2), (32, 1)]),
        (8, 1, 15, [(3, 2), (7, 1)]),
        (2, 1, 4, [(3, 1)]),
        (5, 2, 20, [(5, 3), (10, 2)]),
        (16, 2, 100, [(12, 8), (25, 4), (50, 2)]),
    ],
)
def test_halvings(
    experiments: int, survivors: int, steps: int, expected: list[tuple[int, int]]
) -> None:
    assert rungs(experiments, survivors, steps, 2) == [Rung(*one) for one in expected]


def test_a_search_of_eight_takes_two_and_a_half_trainings() -> None:
    taken, before, remaining = 0, 0, 8
    for rung in rungs(8, 1, 800, 2):
        taken += remaining * (rung.step - before)
        before, remaining = rung.step, rung.kept
    assert (taken + 800 - before) / 800 == 2.5
