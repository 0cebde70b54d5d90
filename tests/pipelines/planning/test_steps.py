"""A length in epochs becomes steps, and every setting that depends on steps is checked then."""

from typing import Any

import pytest

from pipelines.config.recipe import Recipe, parse_recipe
from pipelines.config.sections import OptimizationSettings, TrainingSection
from pipelines.config.steps import resolve_steps, steps_of_epochs
from pipelines.errors import RecipeError
from pipelines.runtime.interfaces.values import narrowed


def recipe_with(training: dict[str, Any], snapshots: list[int] | None = None) -> Recipe:
    return parse_recipe(
        {
            "name": "steps",
            "base_model": {"id": "tiny"},
            "data": {"source": "rows.jsonl"},
            "lora": {"ranks": [2]},
            "frontier": {"snapshots": snapshots or []},
            "training": training,
            "registry": {"model": "steps"},
        }
    )


@pytest.mark.parametrize(
    ("epochs", "examples", "batch_size", "steps"),
    [
        (1, 64, 8, 8),
        (3, 65, 8, 25),  # 195 examples
        (1.1, 10, 11, 1),  # 1.1 × 10 is 11.000000000000002 in binary
        (0.001, 10, 8, 1),
    ],
)
def test_epochs_are_rounded_up_to_steps(
    epochs: float, examples: int, batch_size: int, steps: int
) -> None:
    assert steps_of_epochs(epochs, examples, batch_size) == steps


def test_a_recipe_with_steps_is_unchanged() -> None:
    recipe = recipe_with({"steps": 6})
    assert resolve_steps(recipe, 100) is recipe


def test_epochs_and_steps_give_the_same_training() -> None:
    """The settings in the training's key are equal, and the resolved section can be read again."""
    by_epochs = resolve_steps(recipe_with({"epochs": 2.5, "evaluate_every": 4}), 40)
    by_steps = recipe_with({"steps": 13, "evaluate_every": 4})
    settings = [narrowed(one.training, OptimizationSettings) for one in (by_epochs, by_steps)]
    assert settings[0] == settings[1]
    again = TrainingSection.model_validate(by_epochs.training.model_dump(mode="json"))
    assert again == by_steps.training


@pytest.mark.parametrize(
    ("training", "parts"),
    [
        ({}, ["training has steps None and epochs None", "set one of them"]),
        ({"steps": 3, "epochs": 1}, ["steps 3 and epochs 1.0", "set one of them"]),
        ({"epochs": 0}, ["training.epochs = 0", "greater than 0"]),
        ({"epochs": float("inf")}, ["training.epochs = inf", "finite"]),
        (
            {"steps": 6, "early_stopping_patience": 2},
            ["early_stopping_patience 2 without evaluate_every", "set evaluate_every"],
        ),
    ],
)
def test_a_wrong_length_is_refused(training: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as refusal:
        recipe_with(training)
    assert [part for part in parts if part not in str(refusal.value)] == []


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"warmup_steps": 6}, ["training.warmup_steps 6", "training.steps 6", "at most 5"]),
        ({"evaluate_every": 7}, ["training.evaluate_every 7", "training.steps 6", "at most 6"]),
        (
            {"evaluate_every": 2, "early_stopping_patience": 2},
            ["early_stopping_patience 2 has no effect", "after step 6", "lower the patience"],
        ),
    ],
)
def test_rules_of_steps_are_the_same_for_epochs(settings: dict[str, Any], parts: list[str]) -> None:
    """They are checked as soon as the number of steps is known: here 6 of 8 examples."""
    with pytest.raises(RecipeError) as at_once:
        recipe_with({"steps": 6, **settings})
    recipe = recipe_with({"epochs": 1, **settings})
    with pytest.raises(RecipeError) as later:
        resolve_steps(recipe, 48)
    rule = str(at_once.value).removeprefix("the recipe: ")
    assert [part for part in parts if part not in rule] == []
    assert str(later.value).endswith(rule)
    assert "training.epochs 1 of 48 examples in batches of 8 are 6 steps" in str(later.value)


def test_a_snapshot_after_the_last_step_is_refused_for_epochs() -> None:
    recipe = recipe_with({"epochs": 1}, snapshots=[6])
    with pytest.raises(RecipeError, match=r"frontier\.snapshots names step 6"):
        resolve_steps(recipe, 48)
    assert resolve_steps(recipe, 49).training.total_steps == 7


def test_a_snapshot_that_an_early_stop_may_skip_is_refused() -> None:
    training = {"epochs": 1, "evaluate_every": 1, "early_stopping_patience": 1}
    with pytest.raises(RecipeError, match=r"may not reach; remove one of them"):
        recipe_with(training, snapshots=[2])


def test_the_lowest_patience_that_can_stop_is_accepted() -> None:
    training = recipe_with({"steps": 7, "evaluate_every": 2, "early_stopping_patience": 2}).training
    assert training.early_stopping_patience == 2
