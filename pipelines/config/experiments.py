"""The arms of a comparison: what a recipe trains, and what of it is scored. Pure, and imports no torch.

    control          full fine-tuning, or an adapter of high rank; at each rate of a grid until one is chosen
    rank-R           the adapters that may be registered
    rank-R lr X      the same at other rates, for the frontier alone

Of each arm the frontier may score what it had learnt after S steps, `rank-R@S`, and of the highest rank what is left
when it is cut to rank C, `rank-R→C`.
"""

from dataclasses import dataclass
from typing import Literal

from pipelines.config.recipe import Recipe

Method = Literal["full", "lora"]
CONTROL = "control"


@dataclass(frozen=True)
class Experiment:
    """One training."""

    label: str
    """What a reader calls it."""
    method: Method
    learning_rate: float
    """Peak rate."""
    rank: int | None = None
    """None for full fine-tuning."""
    snapshots: tuple[int, ...] = ()
    """Steps after which what was learnt so far is kept as well."""


@dataclass(frozen=True)
class EvaluatedModel:
    """One model that is scored."""

    label: str
    quantized: bool
    """Whether its base is stored in NF4, and not in full precision."""
    weights: str | None = None
    """Digest of what was trained, or the key of its training; None for a base."""
    output: str | None = None
    """adapter or model; None for a base."""
    folder: str = ""
    """Where that output lies."""
    arm: Experiment | None = None
    """What it was trained as; None for a base, and for what an earlier run registered."""
    step: int | None = None
    """After how many steps; None for its last."""
    cut: int | None = None
    """Rank to which it was cut."""
    whole: bool = True
    """Whether it answers everything; what only the frontier shows answers the task's examples and the benchmarks."""


def control_experiments(recipe: Recipe) -> list[Experiment]:
    """Return the control at each of its rates; nothing where the recipe wants none."""
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
    return [
        Experiment(
            f"rank-{rank}", "lora", recipe.lora.learning_rate, rank, recipe.frontier.snapshots
        )
        for rank in recipe.lora.ranks
    ]


def learning_rate_experiments(recipe: Recipe) -> list[Experiment]:
    """Return the adapters at other rates."""
    rates = recipe.frontier.learning_rates
    return [
        Experiment(f"rank-{rank} lr {rate:g}", "lora", rate, rank)
        for rank in recipe.lora.ranks
        for rate in rates
    ]
