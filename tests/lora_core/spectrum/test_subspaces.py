"""The similarity of two subspaces matches its published formula and textbook cases."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_core import AdapterError, ConfigError
from lora_core.spectrum.spectrum import (
    singular_values,
    subspace_similarity,
)
from lora_core.spectrum.updates import Update

Make = Callable[..., Update]
SIZES = {
    "out": st.integers(1, 12),
    "wide": st.integers(1, 12),
    "rank": st.integers(1, 6),
    "seed": st.integers(0, 99),
}
repeatable = settings(derandomize=True, deadline=None, max_examples=60)


def dense(update: Update) -> Tensor:
    return update.scale * (update.b.double() @ update.a.double())


def similarity_by_hand(first: Update, second: Update, side: str, i: int, j: int) -> float:
    """Apply the formula of section 7.2 to the decomposition of the dense matrices."""
    vectors = []
    for update, count in ((first, i), (second, j)):
        left, _, right = torch.linalg.svd(dense(update), full_matrices=False)
        vectors.append((right if side == "right" else left.T)[:count])
    return (torch.linalg.norm(vectors[0] @ vectors[1].T) ** 2 / min(i, j)).item()


@pytest.mark.parametrize("side", ["right", "left"])
def test_similarity_matches_the_published_formula(random_update: Make, side: str) -> None:
    first = random_update(12, 20, 3, seed=1, scale=2.0)
    second = random_update(12, 20, 5, seed=2)
    grid = subspace_similarity(first, second, side=side)
    assert grid.shape == (3, 5)
    for i in range(1, 4):
        for j in range(1, 6):
            expected = similarity_by_hand(first, second, side, i, j)
            assert grid[i - 1, j - 1].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("side", ["right", "left"])
def test_similarity_to_the_same_update_in_another_basis_is_one(
    random_update: Make, side: str
) -> None:
    """The basis and scale differ; the singular vectors of A alone would be ordered differently."""
    update = random_update(12, 20, 4)
    basis = torch.randn(4, 4, dtype=torch.float64)
    other = Update(basis @ update.a.double(), update.b.double() @ basis.inverse(), 0.25)
    grid = subspace_similarity(update, other, side=side)
    # The tolerance covers the condition of a random basis.
    torch.testing.assert_close(grid, torch.ones_like(grid), rtol=0, atol=1e-10)


def test_disjoint_directions_have_zero_similarity() -> None:
    a = torch.eye(6)
    first = Update(a[:2], torch.randn(5, 2), 1.0)
    second = Update(a[2:5], torch.randn(5, 3), 1.0)
    assert subspace_similarity(first, second).abs().max() < 1e-15
    assert subspace_similarity(first, second, side="left").max() > 0.1


@repeatable
@given(**SIZES)
def test_similarity_is_between_zero_and_one_and_symmetric(
    random_update: Make, out: int, wide: int, rank: int, seed: int
) -> None:
    first = random_update(out, wide, rank, seed=seed)
    second = random_update(out, wide, 3, seed=seed + 1)
    for side in ("right", "left"):
        grid = subspace_similarity(first, second, side=side)
        assert ((grid >= 0) & (grid <= 1)).all()
        mirrored = subspace_similarity(second, first, side=side).T
        torch.testing.assert_close(grid, mirrored, rtol=0, atol=1e-12)


def test_directions_of_zero_singular_values_do_not_count() -> None:
    """Their vectors are arbitrary: rank 4 with one true direction counts as 1, zero as 0."""
    b = torch.cat([torch.randn(7, 1), torch.zeros(7, 3)], dim=1)
    padded = Update(torch.randn(4, 9), b, 1.0)
    zero = Update(torch.randn(2, 9), torch.zeros(7, 2), 1.0)
    assert subspace_similarity(padded, padded).shape == (1, 1)
    assert subspace_similarity(padded, zero).shape == (1, 0)


def test_rounding_noise_does_not_count_as_a_direction() -> None:
    """B has rank 2 in four columns, computed in float32: its last two values are rounding noise."""
    update = Update(torch.randn(4, 90), torch.randn(70, 2) @ torch.randn(2, 4), 1.0)
    assert singular_values(update)[2] > 0
    assert subspace_similarity(update, update).shape == (2, 2)


def test_updates_of_different_sizes_and_unknown_sides_are_refused(random_update: Make) -> None:
    first = random_update(5, 8, 2)
    second = random_update(5, 9, 2)
    assert subspace_similarity(first, second, side="left").shape == (2, 2)
    with pytest.raises(AdapterError, match="the right side has 8 and 9 entries"):
        subspace_similarity(first, second)
    with pytest.raises(ConfigError, match="side='up'"):
        subspace_similarity(first, first, side="up")
