"""Singular value decompositions of a dense matrix: exact, or truncated by subspace iteration.

Both work in float64. This module imports nothing else of the library except its errors, so layers
can be initialized from a decomposition and adapters can be decomposed.

Sources: best approximation of a given rank (Eckart & Young 1936, Psychometrika 1); randomized
subspace iteration (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.errors import ConfigError

OVERSAMPLING = 8
"""Extra directions in the subspace: they absorb the random start's share of unwanted directions."""


@dataclass(frozen=True, eq=False)
class Svd:
    """left · diag(values) · right: orthonormal columns and rows, descending singular values."""

    left: Tensor
    """(out, k), float64"""
    values: Tensor
    """(k,), float64"""
    right: Tensor
    """(k, in), float64"""

    def factors(self, rank: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return B (out, rank) and A (rank, in) of equal norms.

        Args:
            rank: at most k.
            scale: factor of B·A, above 0: scale · B A is the best approximation of that rank.
        """
        roots = (self.values[:rank] / scale).sqrt()
        b = self.left[:, :rank] * roots
        a = roots[:, None] * self.right[:rank]
        return b, a


def decompose(matrix: Tensor) -> Svd:
    """Return all min(out, in) directions of a matrix.

    Args:
        matrix: (out, in), finite.
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Svd(left, values, right)


def decompose_leading(
    matrix: Tensor,
    rank: int,
    iterations: int,
    generator: torch.Generator,
) -> Svd:
    """Approximate the `rank` strongest directions of `matrix`, and a few weaker ones less well.

    Each iteration reduces the error of a direction by the factor
    (σ of the first direction outside the subspace / σ of the direction)².

    Args:
        matrix: (out, in).
        rank: number of directions, at most min(out, in).
        iterations: number of products with WWᵀ; 0 uses the random start unchanged.
        generator: draws the start on the CPU, so that it is the same for every device.

    Raises:
        ConfigError: `iterations` is not an integer of at least 0.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ConfigError(
            f"iterations={iterations!r} must be an integer of at least 0; common values are "
            "4 to 16; leave it out for the exact decomposition"
        )
    matrix = matrix.double()
    _, in_features = matrix.shape
    width = min(rank + OVERSAMPLING, *matrix.shape)
    start = torch.randn(in_features, width, dtype=torch.float64, generator=generator)
    start = start.to(matrix.device)
    basis = _orthonormal(matrix @ start)
    for _ in range(iterations):
        row_basis = _orthonormal(matrix.T @ basis)
        basis = _orthonormal(matrix @ row_basis)
    inner = decompose(basis.T @ matrix)
    return Svd(basis @ inner.left, inner.values, inner.right)


def check_matrix(matrix: Tensor) -> None:
    """Raise unless `matrix` is a finite, non-empty matrix.

    Raises:
        ConfigError: it is not.
    """
    if matrix.dim() != 2 or matrix.numel() == 0 or not torch.isfinite(matrix).all():
        raise ConfigError(
            f"a tensor of shape {tuple(matrix.shape)} must be a matrix of finite values "
            "with at least one entry"
        )


def check_rank(matrix: Tensor, rank: int) -> None:
    """Raise unless `rank` is possible for factors of `matrix`.

    Args:
        matrix: (out, in).
        rank: of the factors.

    Raises:
        ConfigError: the matrix is not finite, or the rank is below 1 or above its smaller side.
    """
    check_matrix(matrix)
    limit = min(matrix.shape)
    if not 1 <= rank <= limit:
        raise ConfigError(
            f"rank {rank} of a {matrix.shape[0]}×{matrix.shape[1]} matrix must be "
            f"from 1 to {limit}; choose another"
        )


def rounding_of(shape: Sequence[int], largest: float, dtype: torch.dtype = torch.float32) -> float:
    """Return the singular value up to which one counts as zero: max(out, in) · ε · σ₁.

    Args:
        shape: (out, in) of the matrix.
        largest: σ₁.
        dtype: in whose precision ε the matrix is known.
    """
    return max(shape) * torch.finfo(dtype).eps * largest


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(columns).Q
    return q
