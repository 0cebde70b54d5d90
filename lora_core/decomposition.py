"""Singular value decompositions of a dense matrix: all of it exactly, or its strong part by subspace iteration.

Both work in float64. Nothing else of the library is needed here, so a layer can start from a decomposition and a
decomposition can be made of an adapter.

Sources: best approximation of a given rank (Eckart & Young 1936, Psychometrika 1); randomised subspace iteration
(Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.errors import ConfigError

OVERSAMPLING = 8
"""Directions followed beside those asked for: they take up what the random start had of the others."""


@dataclass(frozen=True, eq=False)
class Svd:
    """left · diag(values) · right, with orthonormal columns in left and rows in right; values fall."""

    left: Tensor
    """(out, k), float64"""
    values: Tensor
    """(k,), float64"""
    right: Tensor
    """(k, in), float64"""

    def factors(self, rank: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return B (out, rank) and A (rank, in) of equal norms with scale · B A the best approximation of that rank."""
        roots = (self.values[:rank] / scale).sqrt()
        return self.left[:, :rank] * roots, roots[:, None] * self.right[:rank]


def decompose(matrix: Tensor) -> Svd:
    """Return all min(out, in) directions of `matrix` (out, in)."""
    return Svd(*torch.linalg.svd(matrix.double(), full_matrices=False))


def decompose_leading(
    matrix: Tensor, rank: int, iterations: int, generator: torch.Generator
) -> Svd:
    """Return about the `rank` strongest directions of `matrix`, and a few weaker ones that are known less well.

    The error of a direction falls by (σ of the first one not followed / its own σ)² with each iteration.

    Args:
        matrix: (out, in).
        rank: directions wanted, at most min(out, in).
        iterations: products with WWᵀ; 0 takes the random start as it is.
        generator: draws the start on the CPU, so that every device follows the same.

    Raises:
        ConfigError: the iterations are not a whole number of at least 0.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ConfigError(
            f"iterations={iterations!r} must be a whole number of at least 0; 4 to 16 are common, leave it out for all"
        )
    matrix = matrix.double()
    width = min(rank + OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, dtype=torch.float64, generator=generator)
    basis = _orthonormal(matrix @ start.to(matrix.device))
    for _ in range(iterations):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    inner = decompose(basis.T @ matrix)
    return Svd(basis @ inner.left, inner.values, inner.right)


def check_matrix(matrix: Tensor) -> None:
    """Refuse what is no finite matrix."""
    if matrix.dim() != 2 or matrix.numel() == 0 or not torch.isfinite(matrix).all():
        raise ConfigError(
            f"a tensor of shape {tuple(matrix.shape)} must be a matrix of finite values with at least one entry"
        )


def check_rank(matrix: Tensor, rank: int) -> None:
    """Refuse a rank that no factors of a finite `matrix` could have."""
    check_matrix(matrix)
    if not 1 <= rank <= min(matrix.shape):
        raise ConfigError(
            f"rank {rank} of a {matrix.shape[0]}×{matrix.shape[1]} matrix must lie in 1 to {min(matrix.shape)}; choose another"
        )


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(columns).Q
    return q
