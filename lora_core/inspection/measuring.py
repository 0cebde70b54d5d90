"""Rank, scale, norm and spectrum of each update of an adapter's file, without a model.

scale            s, the factor of B·A: alpha / r, or alpha / √r (rsLoRA)
norm             ‖ΔW‖, Frobenius, of ΔW = s · B A, without DoRA's change of the row norms
effective rank   the exponential of the entropy of the singular values, see spectrum.py
"""

from dataclasses import dataclass

import torch

from lora_core.adapter.contents import AdapterContents, Factors
from lora_core.spectrum.spectrum import effective_rank, singular_values
from lora_core.spectrum.updates import Update


@dataclass(frozen=True)
class UpdateFacts:
    """What the file shows about the update of one module."""

    shape: tuple[int, int]
    """(out, in) of the updated weight; a kernel counts to in."""
    rank: int
    alpha: float
    scale: float
    dtype: str
    """Of A, and of B if it differs."""
    norm: float
    """Frobenius norm of ΔW."""
    effective_rank: float


def measure_updates(contents: AdapterContents) -> dict[str, UpdateFacts]:
    """Return module path → facts, for each update whose factors are complete and finite.

    Updates of bare parameters, such as stacks of experts, are left out.
    """
    facts: dict[str, UpdateFacts] = {}
    for name, factors in contents.layers.items():
        update = update_of(name, factors, contents)
        if update is not None:
            facts[name] = _facts(name, factors, update, contents)
    return facts


def update_of(name: str, factors: Factors, contents: AdapterContents) -> Update | None:
    """Return the update of one module in float32; None if it is incomplete or not finite."""
    pair = factors.pair
    if pair is None or not all(bool(torch.isfinite(factor).all()) for factor in pair):
        return None
    a, b = pair
    scale = contents.scales.scale_of(name)
    return Update(a.float(), b.float(), scale, embedding=factors.is_embedding)


def _facts(name: str, factors: Factors, update: Update, contents: AdapterContents) -> UpdateFacts:
    values = singular_values(update)
    dtypes = dict.fromkeys(str(each.dtype).removeprefix("torch.") for each in factors.tensors)
    return UpdateFacts(
        shape=update.shape,
        rank=update.rank,
        alpha=contents.scales.alpha_of(name),
        scale=update.scale,
        dtype="/".join(dtypes),
        norm=float(values.norm()),
        effective_rank=effective_rank(values),
    )
