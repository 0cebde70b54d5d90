"""Singular values of a matrix or an update: its rank, best approximation and directions.

The singular values of ΔW = s · B A are those of the r×r matrix s · R_B R_Aᵀ, where B = Q_B R_B and
Aᵀ = Q_A R_A: an (out, in) product is never formed. Everything is computed in float64 and is exact
to about 1e-14 of the largest value; factors stored in float32 are known to 6e-8.

Sources: best approximation of a given rank (Eckart & Young 1936, Psychometrika 1); effective rank
(Roy & Vetterli 2007, EUSIPCO); similarity of subspaces (LoRA, Hu et al. 2021, arXiv 2106.09685,
section 7.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_core.decomposition import Svd, check_matrix, check_rank, decompose, rounding_of
from lora_core.errors import AdapterError, ConfigError
from lora_core.spectrum.updates import Update

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Factorization:
    """A matrix as a product B A of lower rank."""

    b: Tensor
    """(out, rank)"""
    a: Tensor
    """(rank, in)"""
    relative_error: float
    """Frobenius norm of the error over that of the matrix, before B and A are rounded."""


def numerical_rank(matrix: Tensor, tolerance: float | None = None) -> int:
    """Count the singular values above `tolerance`.

    Args:
        matrix: (out, in).
        tolerance: an absolute bound. The default is max(out, in) · ε · σ₁, with ε of the matrix's
            dtype, or of float32 if the dtype is less precise.

    Raises:
        ConfigError: the matrix is not finite, or the tolerance is below 0.
    """
    check_matrix(matrix)
    if tolerance is not None and not tolerance >= 0:
        raise ConfigError(
            f"tolerance={tolerance!r} must be at least 0; leave it out for the usual rule"
        )
    values = torch.linalg.svdvals(matrix.double())
    if tolerance is None:
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        tolerance = rounding_of(matrix.shape, values[0].item(), dtype)
    return _count_above(values, tolerance)


def factorize(matrix: Tensor, rank: int) -> Factorization:
    """Return the best approximation of a matrix as B (out, rank) times A (rank, in).

    Args:
        matrix: (out, in).
        rank: at most the smaller side.

    Returns:
        B and A in the dtype of the matrix, and the error.

    Raises:
        ConfigError: the rank is below 1 or above the smaller side, or the matrix is not finite.
    """
    check_rank(matrix, rank)
    svd = decompose(matrix)
    b, a = svd.factors(rank)
    return Factorization(
        b=b.to(matrix.dtype),
        a=a.to(matrix.dtype),
        relative_error=truncation_error(svd.values, rank),
    )


def thin_svd(update: Update) -> Svd:
    """Decompose ΔW without forming it.

    Args:
        update: of rank r.

    Returns:
        The k = min(r, out, in) directions of ΔW that can have a nonzero singular value.
    """
    q_b, r_b = torch.linalg.qr(update.b.double())
    q_a, r_a = torch.linalg.qr(update.a.double().T)
    inner = update.scale * (r_b @ r_a.T)
    left, values, right = torch.linalg.svd(inner, full_matrices=False)
    return Svd(
        left=q_b @ left,
        values=values,
        right=right @ q_a.T,
    )


def singular_values(update: Update) -> Tensor:
    """Return the singular values of ΔW that can be nonzero.

    Args:
        update: of rank r.

    Returns:
        (min(r, out, in),) in float64, descending.
    """
    return thin_svd(update).values


def effective_rank(values: Tensor) -> float:
    """Return exp(H(p)) with p = σ / Σσ and H the entropy in nats.

    The result is k for k equal values, 1 for a single value and 0 for none.

    Args:
        values: (k,), singular values.
    """
    if not values.any():
        return 0.0
    precise = values.double()
    probabilities = precise / precise.sum()
    entropy = torch.special.entr(probabilities).sum()
    return float(entropy.exp())


def rank_of_update(values: Tensor, shape: Sequence[int]) -> int:
    """Count the singular values of an update above the rounding of its float32 factors.

    Args:
        values: (k,), singular values, descending.
        shape: (out, in) of the update.
    """
    return _count_above(values, rounding_of(shape, values[0].item()))


def energy(values: Tensor) -> Tensor:
    """Return the fraction of Σσ² in the first 1, 2, … values; all ones if the sum is zero.

    Args:
        values: (k,), singular values, descending.

    Returns:
        (k,) in float64.
    """
    sums = values.double().square().cumsum(0)
    if not values.any():
        return torch.ones_like(sums)
    return sums / sums[-1]


def rank_for_energy(values: Tensor, fraction: float) -> int:
    """Return the smallest rank, at least 1, whose values hold a fraction of the squared norm.

    Args:
        values: (k,), singular values, descending.
        fraction: of Σσ², above 0 and at most 1.

    Raises:
        ConfigError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"fraction={fraction!r} of the energy must be above 0 and at most 1; "
            "0.9 is a common choice"
        )
    is_too_small = energy(values) < fraction
    return int(is_too_small.sum()) + 1


def truncation_error(values: Tensor, rank: int) -> float:
    """Return the relative Frobenius error of the best approximation: ‖σ after rank‖ / ‖σ‖.

    Args:
        values: (k,), singular values, descending.
        rank: of the approximation, at least 0.
    """
    if not values.any():
        return 0.0
    lost = values[rank:].norm()
    return float(lost / values.norm())


def subspace_similarity(first: Update, second: Update, *, side: Side = "right") -> Tensor:
    """Return φ(i, j) = ‖U₁[:i] U₂[:j]ᵀ‖²_F / min(i, j) for all i and j.

    0 means orthogonal, 1 contained. U holds the singular vectors of ΔW, strongest first, as many as
    its numerical rank.

    Args:
        first: one update of a weight.
        second: another of the same weight.
        side: `right` compares what the updates read (row spaces), `left` what they write.

    Returns:
        (i, j) float64; entry (0, 0) compares the first direction of each.

    Raises:
        AdapterError: the updates do not have the same size on that side.
        ConfigError: `side` is unknown.
    """
    if side not in ("left", "right"):
        raise ConfigError(
            f"side={side!r} is unknown; "
            "use 'right' for the row spaces or 'left' for the column spaces"
        )
    one = _directions(first, side)
    other = _directions(second, side)
    if one.shape[1] != other.shape[1]:
        raise AdapterError(
            f"the {side} side has {one.shape[1]} and {other.shape[1]} entries; "
            "compare updates of the same weight"
        )
    shared = (one @ other.T).square().cumsum(0).cumsum(1)
    rows = torch.arange(1, len(one) + 1)[:, None]
    columns = torch.arange(1, len(other) + 1)
    similarity = shared / torch.minimum(rows, columns)
    return similarity.clamp(max=1)  # rounding can exceed 1 by 1e-15


def _directions(update: Update, side: Side) -> Tensor:
    """Return the singular vectors of one side as rows, (numerical rank, out or in).

    Vectors of zero singular values are arbitrary and are not returned.
    """
    svd = thin_svd(update)
    rank = rank_of_update(svd.values, update.shape)
    vectors = svd.right if side == "right" else svd.left.T
    return vectors[:rank]


def _count_above(values: Tensor, tolerance: float) -> int:
    return int((values > tolerance).sum())
