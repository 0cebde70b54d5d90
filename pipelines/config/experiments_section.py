"""The section of a recipe with a grid of adapters, and its rules. Imports no torch."""

import re
from collections.abc import Mapping
from math import prod
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from pipelines.config.fields import Count, LearningRate, Section, distinct
from pipelines.config.sections import FrontierSection, GateSection, LoraSection

TargetModules = str | tuple[str, ...]
SINGLE = {
    "ranks": "lora.ranks",
    "learning_rates": "lora.learning_rate",
    "targets": "lora.target_modules",
}
"""List of the grid → the setting without a grid."""


def _distinct_targets(targets: tuple[TargetModules, ...]) -> tuple[TargetModules, ...]:
    """Refuse names that are not in a list, and lists of the same names."""
    for target in targets:
        if isinstance(target, str) and re.fullmatch(r"\w*", target):
            raise ValueError(
                f"has {target!r}, which is no list: each target is all-linear, a regular "
                f"expression or a list of names, such as [[{target or 'q_proj'}]]"
            )
    distinct(tuple(t if isinstance(t, str) else tuple(sorted(set(t))) for t in targets))
    return targets


class ExperimentsSection(Section):
    """A grid of adapters: every combination of the lists is an experiment.

    They are searched by successive halving. All train for a part of the steps, the half with the
    lower loss on the tuning examples continues, and so on; the survivors are trained to the end,
    exactly as each would be alone. Only survivors are compared and registered.
    """

    ranks: Annotated[tuple[Count, ...], AfterValidator(distinct)] = ()
    """Ranks; `lora.ranks` is then left out."""
    learning_rates: Annotated[tuple[LearningRate, ...], AfterValidator(distinct)] = ()
    """Peak learning rates; `lora.learning_rate` is then left out."""
    targets: Annotated[
        tuple[str | Annotated[tuple[str, ...], Field(min_length=1)], ...],
        AfterValidator(_distinct_targets),
    ] = ()
    """Adapted modules, each as in `lora.target_modules`, which is then left out."""
    survivors: Count | None = None
    """Adapters that are trained to the end; 1 if left out."""

    @property
    def is_grid(self) -> bool:
        """Return whether there is anything to search."""
        return bool(self.ranks or self.learning_rates or self.targets)

    @property
    def size(self) -> int:
        """Return the number of experiments."""
        return prod(len(values) or 1 for values in (self.ranks, self.learning_rates, self.targets))

    @property
    def kept(self) -> int:
        """Return how many experiments are trained to the end."""
        return self.survivors or 1


def with_values_of_grid(values: Any) -> Any:
    """Return a recipe's plain values in which the lora section has the values of the grid.

    Other parts of the recipe read ranks, learning rate and targets there: all ranks of the grid,
    and the first of the other lists.

    Args:
        values: of a recipe, not validated.
    """
    if not isinstance(values, Mapping):
        return values
    grid = values.get("experiments")
    lora = values.get("lora") or {}
    if not isinstance(grid, Mapping) or not isinstance(lora, Mapping):
        return values
    lists = {}
    for name in SINGLE:
        if isinstance(grid.get(name), list | tuple) and grid[name]:
            lists[name] = grid[name]
    found = {}
    if "ranks" in lists:
        found["ranks"] = lists["ranks"]
    if "learning_rates" in lists:
        found["learning_rate"] = lists["learning_rates"][0]
    if "targets" in lists:
        found["target_modules"] = lists["targets"][0]
    return {**values, "lora": {**found, **lora}} if found else values


def check_grid(
    grid: ExperimentsSection, lora: LoraSection, frontier: FrontierSection, gate: GateSection
) -> None:
    """Check that every setting next to a grid has an effect, and that every experiment may pass.

    Args:
        grid: of the recipe.
        lora: the section that has the grid's values unless the recipe sets others.
        frontier: names further models to score.
        gate: with the highest rank.

    Raises:
        ValueError: a setting would have no effect, or an experiment cannot pass the gate.
    """
    if not grid.is_grid:
        if grid.survivors is not None:
            raise ValueError(
                f"experiments.survivors {grid.survivors} has no effect without a grid; name ranks, "
                "learning_rates or targets in experiments"
            )
        return
    if grid.size <= grid.kept:
        raise ValueError(
            f"experiments has {grid.size} combinations and survivors {grid.kept}, so nothing would "
            "be searched; name more values, fewer survivors, or remove the section"
        )
    _check_single(grid, lora)
    if gate.max_rank is not None and max(lora.ranks) > gate.max_rank:
        raise ValueError(
            f"experiments names rank {max(lora.ranks)}, which gate.max_rank {gate.max_rank} "
            "rejects, so that the search could end without an adapter; leave that rank out"
        )
    for name in ("learning_rates", "cuts"):
        if getattr(frontier, name):
            raise ValueError(
                f"frontier.{name} is set next to a grid in experiments, which decides rank and "
                "learning rate of the adapters; remove one of them"
            )


def _check_single(grid: ExperimentsSection, lora: LoraSection) -> None:
    """Check that the lora section has no values besides those of the grid."""
    first = {
        "ranks": grid.ranks and lora.ranks != grid.ranks,
        "learning_rates": grid.learning_rates and lora.learning_rate != grid.learning_rates[0],
        "targets": grid.targets and lora.target_modules != grid.targets[0],
    }
    for name, differs in first.items():
        if differs:
            raise ValueError(
                f"experiments.{name} decides instead of {SINGLE[name]}, which has another value; "
                f"remove {SINGLE[name]}"
            )
