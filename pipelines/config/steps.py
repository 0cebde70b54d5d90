"""The number of optimizer steps of a recipe.

A length in epochs becomes a number of steps once the training examples are counted. The rules that
depend on steps are checked when a recipe is loaded if it has `steps`, and after the data is
prepared if it has `epochs`. Imports no torch.
"""

from fractions import Fraction
from math import ceil

from pipelines.config.recipe import Recipe
from pipelines.config.step_rules import check_steps
from pipelines.errors import RecipeError


def resolve_steps(recipe: Recipe, train_examples: int) -> Recipe:
    """Return the recipe with its length in steps; one that has `steps` is returned unchanged.

    Args:
        recipe: its training has either steps or epochs.
        train_examples: examples of an epoch.

    Raises:
        RecipeError: a setting breaks a rule for this number of steps.
    """
    training = recipe.training
    if training.epochs is None:
        return recipe
    steps = steps_of_epochs(training.epochs, train_examples, training.batch_size)
    resolved = training.model_copy(update={"steps": steps, "epochs": None})
    try:
        check_steps(resolved, recipe.frontier, recipe.experiments)
    except ValueError as error:
        raise RecipeError(
            f"training.epochs {training.epochs:g} of {train_examples} examples in batches of "
            f"{training.batch_size} are {steps} steps: {error}"
        ) from error
    return recipe.model_copy(update={"training": resolved})


def steps_of_epochs(epochs: float, train_examples: int, batch_size: int) -> int:
    """Return the steps that read the examples `epochs` times, rounded up.

    The decimal digits of `epochs` count, so that 1.1 epochs of 10 examples are exactly 11 examples.

    Args:
        epochs: how often the examples are read; may have a fraction.
        train_examples: examples of an epoch.
        batch_size: examples per step, over all processes.
    """
    return ceil(Fraction(str(epochs)) * train_examples / batch_size)
