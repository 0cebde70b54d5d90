"""Ranks, spectra and subspaces beside what torch.linalg says of the dense matrices, and the cases of the textbooks."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_core import AdapterError, ConfigError
from lora_core.spectrum.spectrum import (
    effective_rank,
    energy,
    factorize,
    numerical_rank,
    rank_for_energy,
    singular_values,
    subspace_similarity,
    thin_svd,
    truncation_error,
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


# --- matrices ---


def test_a_2_by_3_matrix_of_rank_1_is_a_column_times_a_row() -> None:
    matrix = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    assert numerical_rank(matrix) == 1
    factors = factorize(matrix, 1)
    assert (factors.b.shape, factors.a.shape) == ((2, 1), (1, 3))
    torch.testing.assert_close(
        factors.b @ factors.a, matrix, rtol=1e-6, atol=0
    )  # three roundings to float32
    assert factors.relative_error < 1e-15


@pytest.mark.parametrize("rank", [1, 10, 99, 100])
def test_a_1000_by_100_matrix_loses_the_tail_of_its_singular_values(rank: int) -> None:
    matrix = torch.randn(1000, 100, dtype=torch.float64)
    factors = factorize(matrix, rank)
    assert (factors.b.shape, factors.a.shape) == ((1000, rank), (rank, 100))
    tail = torch.linalg.svdvals(matrix)[rank:]
    lost = torch.linalg.norm(matrix - factors.b @ factors.a).item()
    assert lost == pytest.approx(
        tail.norm().item(), rel=1e-10, abs=1e-11
    )  # float64 over 100 directions
    assert factors.relative_error == pytest.approx(
        lost / matrix.norm().item(), rel=1e-10, abs=1e-14
    )


def test_no_random_factors_come_closer_than_the_best() -> None:
    """Eckart and Young against least squares: for any A the best B of that row space still loses more."""
    matrix = torch.randn(20, 15, dtype=torch.float64)
    best = factorize(matrix, 4).relative_error
    for _ in range(20):
        a = torch.linalg.qr(torch.randn(15, 4, dtype=torch.float64)).Q.T
        assert (matrix - matrix @ a.T @ a).norm() / matrix.norm() > best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_factors_have_the_dtype_of_the_matrix_and_equal_norms(dtype: torch.dtype) -> None:
    factors = factorize(torch.randn(6, 9).to(dtype), 3)
    assert (factors.b.dtype, factors.a.dtype) == (dtype, dtype)
    assert factors.b.float().norm().item() == pytest.approx(
        factors.a.float().norm().item(), rel=1e-2
    )


@repeatable
@given(**SIZES)
def test_the_numerical_rank_is_the_rank_by_construction(
    random_update: Make, out: int, wide: int, rank: int, seed: int
) -> None:
    matrix = dense(random_update(out, wide, rank, seed=seed))
    assert numerical_rank(matrix) == torch.linalg.matrix_rank(matrix).item()
    assert numerical_rank(matrix) <= min(out, wide, rank)


def test_the_numerical_rank_of_a_rounded_product_does_not_count_the_rounding() -> None:
    matrix = torch.randn(200, 5) @ torch.randn(5, 300)
    assert torch.linalg.svdvals(matrix.double())[5] > 1e-7  # what rounding to float32 left behind
    assert numerical_rank(matrix) == 5
    assert numerical_rank(matrix, tolerance=0.0) == 200


def test_a_tolerance_is_absolute() -> None:
    matrix = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    assert [numerical_rank(matrix, tolerance=bound) for bound in (0.5, 1.5, 3.0, 8.0)] == [
        4,
        3,
        2,
        0,
    ]
    assert numerical_rank(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_that_no_factors_could_have_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} of a 5×3 matrix must be from 1 to 3"):
        factorize(torch.randn(5, 3), rank)


@pytest.mark.parametrize(
    "matrix",
    [torch.ones(3), torch.ones(0, 3), torch.tensor([[math.nan]])],
    ids=["vector", "empty", "nan"],
)
def test_what_is_no_finite_matrix_is_refused(matrix: Tensor) -> None:
    for function in (lambda m: factorize(m, 1), numerical_rank):
        with pytest.raises(ConfigError, match="a matrix of finite values"):
            function(matrix)
    with pytest.raises(ConfigError, match="tolerance=-1"):
        numerical_rank(torch.ones(2, 2), tolerance=-1)


# --- the spectrum of an update ---


@repeatable
@given(**SIZES, scale=st.floats(0.01, 100))
def test_singular_values_are_those_of_the_dense_update(
    random_update: Make, out: int, wide: int, rank: int, seed: int, scale: float
) -> None:
    update = random_update(out, wide, rank, scale=scale, seed=seed)
    expected = torch.linalg.svdvals(dense(update))
    found = singular_values(update)
    assert len(found) == min(out, wide, rank)
    torch.testing.assert_close(
        found, expected[: len(found)], rtol=0, atol=1e-13 * expected[0].item()
    )
    assert (expected[len(found) :] < 1e-13 * expected[0]).all()


@repeatable
@given(**SIZES)
def test_the_thin_decomposition_is_the_update(
    random_update: Make, out: int, wide: int, rank: int, seed: int
) -> None:
    update = random_update(out, wide, rank, seed=seed, scale=0.5)
    svd = thin_svd(update)
    expected, identity = dense(update), torch.eye(len(svd.values), dtype=torch.float64)
    torch.testing.assert_close(
        svd.left * svd.values @ svd.right, expected, rtol=0, atol=1e-13 * expected.norm().item()
    )
    torch.testing.assert_close(svd.left.T @ svd.left, identity, rtol=0, atol=1e-13)
    torch.testing.assert_close(svd.right @ svd.right.T, identity, rtol=0, atol=1e-13)


def test_an_update_of_zero_has_a_spectrum_of_zero() -> None:
    """As every adapter at step 0: the shares are defined and nothing is divided by zero."""
    values = singular_values(Update(torch.randn(3, 8), torch.zeros(6, 3), 2.0))
    assert values.tolist() == [0, 0, 0]
    assert effective_rank(values) == 0
    assert energy(values).tolist() == [1, 1, 1]
    assert rank_for_energy(values, 0.9) == 1
    assert truncation_error(values, 1) == 0


# --- effective rank and energy ---


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_values_have_their_number_as_effective_rank(count: int) -> None:
    values = torch.cat([torch.full((count,), 0.3), torch.zeros(4)])
    assert effective_rank(values) == pytest.approx(count, rel=1e-12)


def test_effective_rank_of_three_to_one() -> None:
    """By hand: p = 3/4, 1/4, so exp(H) = (4/3)^(3/4) · 4^(1/4)."""
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        (4 / 3) ** 0.75 * 4**0.25, rel=1e-12
    )


values_of = st.lists(st.floats(0.001, 1000), min_size=1, max_size=12).map(
    lambda xs: torch.tensor(sorted(xs, reverse=True)).double()
)


@repeatable
@given(values=values_of, factor=st.floats(0.01, 100))
def test_effective_rank_lies_between_one_and_the_rank_and_knows_no_scale(
    values: Tensor, factor: float
) -> None:
    found = effective_rank(values)
    assert 1 - 1e-12 <= found <= len(values) + 1e-9
    assert effective_rank(factor * values) == pytest.approx(found, rel=1e-9)


@repeatable
@given(values=values_of)
def test_energy_rises_to_one_and_the_error_is_its_complement(values: Tensor) -> None:
    shares = energy(values)
    assert (shares.diff() >= 0).all()
    assert shares[-1] == 1
    for rank, share in enumerate(shares.tolist(), start=1):
        assert share == pytest.approx(
            sum(v * v for v in values.tolist()[:rank]) / sum(v * v for v in values.tolist()),
            rel=1e-12,
        )
        assert truncation_error(values, rank) ** 2 == pytest.approx(1 - share, abs=1e-12)


@repeatable
@given(values=values_of, share=st.floats(0.01, 1))
def test_the_rank_for_an_energy_is_the_smallest(values: Tensor, share: float) -> None:
    rank, shares = rank_for_energy(values, share), energy(values)
    assert shares[rank - 1] >= share
    assert rank == 1 or shares[rank - 2] < share


def test_energy_by_hand() -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert energy(values).tolist() == pytest.approx([4 / 6, 5 / 6, 1, 1])
    assert [rank_for_energy(values, share) for share in (0.5, 0.7, 0.9, 1.0)] == [1, 2, 3, 3]


@pytest.mark.parametrize("share", [0, -0.1, 1.01, math.nan])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="fraction="):
        rank_for_energy(torch.ones(3), share)


# --- subspaces ---


def similarity_by_hand(first: Update, second: Update, side: str, i: int, j: int) -> float:
    """The formula of section 7.2 on the decomposition of the dense matrices."""
    vectors = []
    for update, count in ((first, i), (second, j)):
        left, _, right = torch.linalg.svd(dense(update), full_matrices=False)
        vectors.append((right if side == "right" else left.T)[:count])
    return (torch.linalg.norm(vectors[0] @ vectors[1].T) ** 2 / min(i, j)).item()


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_grid_is_the_published_formula(random_update: Make, side: str) -> None:
    first, second = random_update(12, 20, 3, seed=1, scale=2.0), random_update(12, 20, 5, seed=2)
    grid = subspace_similarity(first, second, side=side)
    assert grid.shape == (3, 5)
    for i in range(1, 4):
        for j in range(1, 6):
            assert grid[i - 1, j - 1].item() == pytest.approx(
                similarity_by_hand(first, second, side, i, j), abs=1e-12
            )


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_update_is_wholly_similar_to_itself_however_it_is_written(
    random_update: Make, side: str
) -> None:
    """Another basis and scale of the same ΔW; the singular vectors of A alone would see another subspace order."""
    update = random_update(12, 20, 4)
    basis = torch.randn(4, 4, dtype=torch.float64)
    other = Update(basis @ update.a.double(), update.b.double() @ basis.inverse(), 0.25)
    grid = subspace_similarity(update, other, side=side)
    torch.testing.assert_close(
        grid, torch.ones_like(grid), rtol=0, atol=1e-10
    )  # the condition of a random basis


def test_disjoint_directions_have_no_similarity() -> None:
    a = torch.eye(6)
    first, second = Update(a[:2], torch.randn(5, 2), 1.0), Update(a[2:5], torch.randn(5, 3), 1.0)
    assert subspace_similarity(first, second).abs().max() < 1e-15
    assert subspace_similarity(first, second, side="left").max() > 0.1


@repeatable
@given(**SIZES)
def test_similarity_lies_between_zero_and_one_and_is_symmetric(
    random_update: Make, out: int, wide: int, rank: int, seed: int
) -> None:
    first, second = (
        random_update(out, wide, rank, seed=seed),
        random_update(out, wide, 3, seed=seed + 1),
    )
    for side in ("right", "left"):
        grid = subspace_similarity(first, second, side=side)
        assert ((grid >= 0) & (grid <= 1)).all()
        torch.testing.assert_close(
            grid, subspace_similarity(second, first, side=side).T, rtol=0, atol=1e-12
        )


def test_directions_without_strength_do_not_count() -> None:
    """Their vectors are arbitrary: a rank of 4 with one true direction is compared as one, an update of zero as none."""
    padded = Update(
        torch.randn(4, 9), torch.cat([torch.randn(7, 1), torch.zeros(7, 3)], dim=1), 1.0
    )
    assert subspace_similarity(padded, padded).shape == (1, 1)
    assert subspace_similarity(padded, Update(torch.randn(2, 9), torch.zeros(7, 2), 1.0)).shape == (
        1,
        0,
    )


def test_what_rounding_left_is_no_direction() -> None:
    """A B of rank 2 in four columns, formed in float32: its last two values are the rounding, not zero."""
    update = Update(torch.randn(4, 90), torch.randn(70, 2) @ torch.randn(2, 4), 1.0)
    assert singular_values(update)[2] > 0
    assert subspace_similarity(update, update).shape == (2, 2)


def test_updates_of_different_sizes_and_unknown_sides_are_refused(random_update: Make) -> None:
    first, second = random_update(5, 8, 2), random_update(5, 9, 2)
    assert subspace_similarity(first, second, side="left").shape == (2, 2)
    with pytest.raises(AdapterError, match="the right side has 8 and 9 entries"):
        subspace_similarity(first, second)
    with pytest.raises(ConfigError, match="side='up'"):
        subspace_similarity(first, first, side="up")
