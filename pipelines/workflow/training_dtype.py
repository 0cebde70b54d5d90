"""The dtype of a training on a CPU: what the recipe sets, or else what is fastest on this host.

A GPU's is chosen by the training itself, from what the GPU can do. Imports no torch.
"""

from collections.abc import Callable

from pipelines.config.recipe import Recipe
from pipelines.config.sections import TrainingDtype
from pipelines.runtime.interfaces.results import ProcessorResult
from pipelines.runtime.sharding import launch_facts
from pipelines.workflow.stages import ProcessorStage, Stages

WORTH_IT = 1.3
"""Smallest gain in speed of products for which a training uses bfloat16."""


def resolve_dtype(
    recipe: Recipe, stages: Stages, run: Callable[[ProcessorStage], ProcessorResult]
) -> Recipe:
    """Return the recipe with the dtype of a training on a CPU, which is part of the training's key.

    Args:
        recipe: returned as it is if it sets the dtype, or is for GPUs.
        stages: of the recipe.
        run: runs the stage that measures the processor, or returns its cached result.
    """
    training = recipe.training
    if training.dtype != "auto" or launch_facts(recipe.launch.config).device == "gpu":
        return recipe
    stage = stages.processor()
    dtype: TrainingDtype = "float32"
    if stage is not None and run(stage).speedup >= WORTH_IT:
        dtype = "bfloat16"
    return recipe.model_copy(update={"training": training.model_copy(update={"dtype": dtype})})
