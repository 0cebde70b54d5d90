"""Intruder dimensions: strong directions of a merged weight that the base weight does not have.

    u_i, one of the k strongest of W', is an intruder if |⟨u_i, u_j⟩| < ε for all u_j of W

W' = W + s·B A is the merged weight, u are left singular vectors. Full fine-tuning mostly rotates
and scales the directions of W. LoRA can add strong new ones, and adapters with many of them forgot
more of what the base knew. The paper counts left singular vectors, with k = 10 and ε = 0.5; right
ones are counted in the same way.

Directions of W with a singular value of zero do not count: they are arbitrary. Weights are compared
with all other directions of W if their smaller side is at most `leading.EXACT_SIDE`, and with the
strongest k + `MARGIN` otherwise: only a direction whose singular value is within about ‖ΔW‖ / ε of
that of u_i can resemble u_i.

Source: Shuttleworth et al. 2024, arXiv 2410.21228, definition 1 and algorithm 1.
"""

from dataclasses import dataclass

from torch import Tensor

from lora_core.decomposition import check_matrix
from lora_core.errors import AdapterError, ConfigError
from lora_core.spectrum.leading import decomposition_work, is_decomposed_exactly, leading_svd
from lora_core.spectrum.updates import Update

LEADING = 10
"""Default k."""
THRESHOLD = 0.5
"""Default ε."""
MARGIN = 128
"""How many more directions of a large W are compared than of W'."""


@dataclass(frozen=True)
class Intruders:
    """The intruder dimensions of one merged weight."""

    left: int
    """Left singular vectors that resemble none of W: the published count."""
    right: int
    """Right singular vectors that resemble none of W."""
    leading: int
    """How many leading directions of W' were compared."""
    is_exact: bool
    """Whether they were compared with all directions of W."""


def intruder_dimensions(
    weight: Tensor, update: Update, *, leading: int = LEADING, threshold: float = THRESHOLD
) -> Intruders:
    """Count the leading singular vectors of W + ΔW that resemble none of W.

    Args:
        weight: W, (out, in), of any float dtype.
        update: ΔW.
        leading: k, at least 1; reduced to the number of directions that W + ΔW has.
        threshold: ε, above 0 and at most 1: the smallest cosine of vectors that resemble each
            other.

    Raises:
        ConfigError: `leading` or `threshold` is out of range, or the weight is not finite.
        AdapterError: the weight and the update have different shapes.
    """
    if tuple(weight.shape) != update.shape:
        raise AdapterError(
            f"the update is {update.shape} and the weight {tuple(weight.shape)}; "
            "give the base it was trained on"
        )
    delta = update.scale * (update.b.double() @ update.a.double())
    merged = weight.double() + delta
    return intruders_of_merged(weight, merged, leading=leading, threshold=threshold)


def intruders_of_merged(
    weight: Tensor, merged: Tensor, *, leading: int = LEADING, threshold: float = THRESHOLD
) -> Intruders:
    """Count the leading singular vectors of any changed weight that resemble none of W.

    Args:
        weight: W, (out, in).
        merged: W', (out, in).
        leading: k.
        threshold: ε; see `intruder_dimensions`.

    Raises:
        ConfigError: see `intruder_dimensions`.
    """
    check_matrix(weight)
    check_matrix(merged)
    _check_settings(leading, threshold)
    is_exact = is_decomposed_exactly(weight)
    compared = min(weight.shape) if is_exact else leading + MARGIN
    base = leading_svd(weight, compared)
    # The first directions of a subspace iteration converge in a wide subspace.
    width = leading if is_exact else compared
    changed = leading_svd(merged, width)
    return Intruders(
        left=_count_unlike(changed.left.T[:leading], base.left.T, threshold),
        right=_count_unlike(changed.right[:leading], base.right, threshold),
        leading=len(changed.values[:leading]),
        is_exact=is_exact,
    )


def intruder_work(rows: int, columns: int, leading: int = LEADING) -> float:
    """Estimate the multiplications of a count for a (rows, columns) weight."""
    return 2 * decomposition_work(rows, columns, leading + MARGIN)


def _count_unlike(vectors: Tensor, references: Tensor, threshold: float) -> int:
    """Count the rows of `vectors` whose cosine with each row of `references` is below ε."""
    if not len(references):
        return len(vectors)
    largest = (vectors @ references.T).abs().amax(dim=1)
    return int((largest < threshold).sum())


def _check_settings(leading: int, threshold: float) -> None:
    if leading < 1:
        raise ConfigError(f"leading={leading!r} must be at least 1; 10 is the published choice")
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"threshold={threshold!r} must be above 0 and at most 1; 0.5 is the published choice"
        )
