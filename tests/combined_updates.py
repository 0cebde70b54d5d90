"""References of combined updates: dense sums and truncations."""

from typing import Any

import torch
from torch import Tensor

from lora_core.spectrum.combining import combine
from lora_core.spectrum.updates import Update


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def weighted_sum(updates: list[Update], weights: list[float]) -> Tensor:
    return sum(
        weight * update.scale * (update.b.double() @ update.a.double())
        for update, weight in zip(updates, weights, strict=True)
    )


def full_rank_delta(
    updates: list[dict[str, Update]], weights: list[float], **options: Any
) -> Tensor:
    """Return the combined ΔW of the layer `x` at full rank."""
    shape = updates[0]["x"].shape
    return combine(updates, weights, rank=min(shape), **options).updates["x"].dense()
