"""The leading singular vectors of a dense matrix, exactly or by subspace iteration.

Up to `EXACT_SIDE` rows or columns, they are eigenvectors of the Gram matrix of the smaller side,
W Wᵀ or Wᵀ W, in float64: all of them, exact to about 1e-8 of the largest singular value, at the
cost of min(out, in)³. Above, randomized subspace iteration finds the strongest ones.

Source: randomized subspace iteration (Halko, Martinsson & Tropp 2011, arXiv 0909.4061).
"""

import torch
from torch import Tensor

from lora_core.decomposition import OVERSAMPLING, Svd, decompose_leading, rounding_of

EXACT_SIDE = 2048
"""Largest smaller side of a matrix that is decomposed exactly."""
ITERATIONS = 8
"""Products with WWᵀ for larger matrices; each squares the ratio of the singular values."""
EIGENVECTOR_WORK = 10
"""Multiplications of an eigendecomposition, in cubes of the side."""


def is_decomposed_exactly(matrix: Tensor) -> bool:
    """Return whether `leading_svd` decomposes a matrix of this shape exactly."""
    return min(matrix.shape) <= EXACT_SIDE


def decomposition_work(rows: int, columns: int, count: int) -> float:
    """Estimate the multiplications of `leading_svd` of a (rows, columns) matrix."""
    side = min(rows, columns)
    if side <= EXACT_SIDE:
        return side * rows * columns + EIGENVECTOR_WORK * side**3
    products = 2 * ITERATIONS + 2
    return products * rows * columns * (count + OVERSAMPLING)


def leading_svd(matrix: Tensor, count: int) -> Svd:
    """Return the strongest directions of `matrix`, without those of zero singular values.

    A singular value counts as zero up to max(out, in) · ε · σ₁ with ε of float32, the precision in
    which weights are known.

    Args:
        matrix: (out, in), finite.
        count: how many directions at most.
    """
    matrix = matrix.double()
    if is_decomposed_exactly(matrix):
        svd = _from_gram(matrix, count)
    else:
        generator = torch.Generator().manual_seed(0)
        rank = min(count, *matrix.shape)
        svd = decompose_leading(matrix, rank, ITERATIONS, generator)
    zero = rounding_of(matrix.shape, float(svd.values[0]))
    kept = min(count, int((svd.values > zero).sum()))
    return Svd(svd.left[:, :kept], svd.values[:kept], svd.right[:kept])


def _from_gram(matrix: Tensor, count: int) -> Svd:
    """Decompose a float64 matrix by the eigenvectors of the Gram matrix of its smaller side."""
    if matrix.shape[0] > matrix.shape[1]:
        svd = _from_gram(matrix.T, count)
        return Svd(svd.right.T, svd.values, svd.left.T)
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    left = vectors.flip(1)[:, :count]
    values = squares.flip(0)[:count].clamp_min(0).sqrt()
    right = left.T @ matrix
    lengths = values.where(values > 0, 1.0)
    return Svd(left, values, right / lengths[:, None])
