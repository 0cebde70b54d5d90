"""The experiments of a recipe: what it trains, and which models it scores.

Pure, and imports no torch.

    control          full fine-tuning, or an adapter of high rank; at several learning rates until
                     one is chosen
    rank-R           the adapters that may be registered
    rank-R lr X      the same at other learning rates: for the frontier only, or of a grid, whose
                     survivors may be registered

For the frontier, an experiment may also be scored after S steps, as `rank-R@S`, and the adapter of
the highest rank may be truncated to rank C, as `rank-R→C`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from pipelines.config.experiments_section import TargetModules
from pipelines.config.recipe import Recipe

Method = Literal["full", "lora"]
CONTROL = "control"
SHORT_NAME = re.compile(r"[\w.+-]{1,40}")
"""Target modules that a label names; it numbers others."""


@dataclass(frozen=True)
class Experiment:
    """One training."""

    label: str
    """Name for readers."""
    method: Method
    learning_rate: float
    """Peak learning rate."""
    rank: int | None = None
    """None for full fine-tuning."""
    snapshots: tuple[int, ...] = ()
    """Steps after which the weights are saved as well."""
    target_modules: TargetModules | None = None
    """Adapted modules; None for those of the recipe's lora section."""


@dataclass(frozen=True)
class EvaluatedModel:
    """One model that is scored."""

    label: str
    quantized: bool
    """Whether its base is stored in NF4 instead of full precision."""
    weights: str | None = None
    """Digest of the trained weights, or the key of their training; None for a base."""
    output: str | None = None
    """adapter or model; None for a base."""
    folder: str = ""
    """Folder of that output."""
    experiment: Experiment | None = None
    """The training that it comes from; None for a base, and for an adapter that an earlier run
    registered."""
    step: int | None = None
    """Step of a snapshot; None for the saved weights."""
    saved_step: int | None = None
    """Optimizer steps that its weights have taken; None for a base, and for an adapter that an
    earlier run registered."""
    truncated_rank: int | None = None
    """Rank to which the adapter was truncated; None if it was not."""
    is_complete: bool = True
    """Whether it is scored on every item. A model that only the frontier shows is scored on the
    task's examples and the benchmarks."""


def control_experiments(recipe: Recipe) -> list[Experiment]:
    """Return the control at each of its learning rates; nothing if the recipe has no control."""
    section = recipe.control
    if section.method == "none":
        return []
    rates = section.learning_rate
    labels = [CONTROL] if len(rates) == 1 else [f"{CONTROL} lr {rate:g}" for rate in rates]
    steps = recipe.frontier.snapshots
    return [
        Experiment(label, section.method, rate, section.rank, steps)
        for label, rate in zip(labels, rates, strict=True)
    ]


def rank_experiments(recipe: Recipe) -> list[Experiment]:
    """Return the adapters that are compared and may be registered."""
    rate = recipe.lora.learning_rate
    steps = recipe.frontier.snapshots
    return [Experiment(f"rank-{rank}", "lora", rate, rank, steps) for rank in recipe.lora.ranks]


def learning_rate_experiments(recipe: Recipe) -> list[Experiment]:
    """Return the adapters at other learning rates."""
    experiments = []
    for rank in recipe.lora.ranks:
        for rate in recipe.frontier.learning_rates:
            experiments.append(Experiment(f"rank-{rank} lr {rate:g}", "lora", rate, rank))
    return experiments


def grid_experiments(recipe: Recipe) -> list[Experiment]:
    """Return every combination of the recipe's grid; nothing if it has none."""
    grid = recipe.experiments
    if not grid.is_grid:
        return []
    rates = grid.learning_rates or (recipe.lora.learning_rate,)
    targets = grid.targets or (recipe.lora.target_modules,)
    steps = recipe.frontier.snapshots
    experiments = []
    named_targets = zip(_short_names(targets), targets, strict=True)
    for rank, rate, (name, target) in product(recipe.lora.ranks, rates, named_targets):
        label = f"rank-{rank}"
        if len(rates) > 1:
            label += f" lr {rate}"
        if len(targets) > 1:
            label += f" {name}"
        experiments.append(Experiment(label, "lora", rate, rank, steps, target))
    return experiments


def _short_names(targets: Sequence[TargetModules]) -> list[str]:
    """Return target modules as parts of labels: their number in the grid if they are long.

    If two of them would have the same name, all are numbered.
    """
    names = []
    for number, target in enumerate(targets, start=1):
        name = target if isinstance(target, str) else "+".join(target)
        names.append(name if SHORT_NAME.fullmatch(name) else f"targets-{number}")
    if len(set(names)) < len(names):
        return [f"targets-{number}" for number in range(1, len(names) + 1)]
    return names


def target_variants(recipe: Recipe) -> list[Recipe]:
    """Return the recipe for each choice of target modules in its grid; itself if there is none."""
    variants = []
    for target in recipe.experiments.targets or (recipe.lora.target_modules,):
        lora = recipe.lora.model_copy(update={"target_modules": target})
        variants.append(recipe.model_copy(update={"lora": lora}))
    return variants
