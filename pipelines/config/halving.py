"""After how many steps a search by successive halving stops which experiments. Imports no torch.

    8 experiments, 64 steps     8 after 8 steps → 4 after 16 → 2 after 32 → 1 to the end

Each halving comes at half the steps of the next one, so that a search of 2ᵏ experiments for one
survivor takes 1 + k/2 times as many steps as one training, if the warm-up ends before the first
halving (Karnin et al. 2013, Almost Optimal Exploration in
Multi-Armed Bandits; Jamieson & Talwalkar 2016, arXiv 1502.07943).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """A halving."""

    step: int
    """Optimizer steps that each experiment has taken."""
    kept: int
    """Experiments that continue."""


def rungs(experiments: int, survivors: int, steps: int, warmup_steps: int) -> list[Rung]:
    """Return the halvings of a search, in order.

    No halving comes before a step at the peak learning rate. Those that would come earlier are
    made together.

    Args:
        experiments: in the grid, more than `survivors`.
        survivors: experiments that are trained to the end.
        steps: of a whole training.
        warmup_steps: after which the peak learning rate is reached, less than `steps`.

    Raises:
        ValueError: there is no step between the warm-up and the end after which to decide.
    """
    earliest = warmup_steps + 1
    if earliest >= steps:
        raise ValueError(
            f"experiments cannot be searched in training.steps {steps} with "
            f"training.warmup_steps {warmup_steps}: a halving needs a step at the peak learning "
            f"rate before the end; use at least {warmup_steps + 2} steps"
        )
    kept_counts = []
    remaining = experiments
    while remaining > survivors:
        remaining = max(survivors, (remaining + 1) // 2)
        kept_counts.append(remaining)
    kept_after: dict[int, int] = {}
    for index, kept in enumerate(reversed(kept_counts)):
        step = max(earliest, steps >> (index + 1))
        kept_after.setdefault(step, kept)
    return [Rung(step, kept) for step, kept in sorted(kept_after.items())]
