"""Ranks and spectra agree with torch.linalg on dense matrices and textbook cases."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_core import ConfigError
from lora_core.spectrum.spectrum import (
    effective_rank,
    energy,
    factorize,
    numerical_rank,
    rank_for_energy,
    singular_values,
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


def test_2_by_3_matrix_of_rank_1_is_a_column_times_a_row() -> None:
    matrix = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    assert numerical_rank(matrix) == 1
    factors = factorize(matrix, 1)
    assert (factors.b.shape, factors.a.shape) == ((2, 1), (1, 3))
    # Three roundings to float32.
    torch.testing.assert_close(factors.b @ factors.a, matrix, rtol=1e-6, atol=0)
    assert factors.relative_error < 1e-15


@pytest.mark.parametrize("rank", [1, 10, 99, 100])
def test_1000_by_100_matrix_loses_the_tail_of_its_singular_values(rank: int) -> None:
    matrix = torch.randn(1000, 100, dtype=torch.float64)
    factors = factorize(matrix, rank)
    assert (factors.b.shape, factors.a.shape) == ((1000, rank), (rank, 100))
    tail = torch.linalg.svdvals(matrix)[rank:]
    lost = torch.linalg.norm(matrix - factors.b @ factors.a).item()
    # float64 over 100 directions.
    assert lost == pytest.approx(tail.norm().item(), rel=1e-10, abs=1e-11)
    relative = lost / matrix.norm().item()
    assert factors.relative_error == pytest.approx(relative, rel=1e-10, abs=1e-14)


def test_random_factors_are_never_closer_than_the_best() -> None:
    """Eckart and Young versus least squares: for any A, even its best B loses more."""
    matrix = torch.randn(20, 15, dtype=torch.float64)
    best = factorize(matrix, 4).relative_error
    for _ in range(20):
        a = torch.linalg.qr(torch.randn(15, 4, dtype=torch.float64)).Q.T
        assert (matrix - matrix @ a.T @ a).norm() / matrix.norm() > best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_factors_have_the_dtype_of_the_matrix_and_equal_norms(dtype: torch.dtype) -> None:
    factors = factorize(torch.randn(6, 9).to(dtype), 3)
    assert (factors.b.dtype, factors.a.dtype) == (dtype, dtype)
    norm = factors.a.float().norm().item()
    assert factors.b.float().norm().item() == pytest.approx(norm, rel=1e-2)


@repeatable
@given(**SIZES)
def test_numerical_rank_is_the_rank_by_construction(
    random_update: Make, out: int, wide: int, rank: int, seed: int
) -> None:
    matrix = dense(random_update(out, wide, rank, seed=seed))
    assert numerical_rank(matrix) == torch.linalg.matrix_rank(matrix).item()
    assert numerical_rank(matrix) <= min(out, wide, rank)


def test_numerical_rank_ignores_rounding_noise() -> None:
    matrix = torch.randn(200, 5) @ torch.randn(5, 300)
    assert torch.linalg.svdvals(matrix.double())[5] > 1e-7  # float32 rounding noise
    assert numerical_rank(matrix) == 5
    assert numerical_rank(matrix, tolerance=0.0) == 200


def test_tolerance_is_absolute() -> None:
    matrix = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    ranks = [numerical_rank(matrix, tolerance=bound) for bound in (0.5, 1.5, 3.0, 8.0)]
    assert ranks == [4, 3, 2, 0]
    assert numerical_rank(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} of a 5×3 matrix must be from 1 to 3"):
        factorize(torch.randn(5, 3), rank)


@pytest.mark.parametrize(
    "matrix",
    [torch.ones(3), torch.ones(0, 3), torch.tensor([[math.nan]])],
    ids=["vector", "empty", "nan"],
)
def test_input_that_is_not_a_finite_matrix_is_refused(matrix: Tensor) -> None:
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
def test_thin_decomposition_reproduces_the_update(
    random_update: Make, out: int, wide: int, rank: int, seed: int
) -> None:
    update = random_update(out, wide, rank, seed=seed, scale=0.5)
    svd = thin_svd(update)
    expected = dense(update)
    identity = torch.eye(len(svd.values), dtype=torch.float64)
    product = svd.left * svd.values @ svd.right
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-13 * expected.norm().item())
    torch.testing.assert_close(svd.left.T @ svd.left, identity, rtol=0, atol=1e-13)
    torch.testing.assert_close(svd.right @ svd.right.T, identity, rtol=0, atol=1e-13)


def test_zero_update_has_a_zero_spectrum() -> None:
    """As for every adapter at step 0: fractions are defined and nothing is divided by zero."""
    values = singular_values(Update(torch.randn(3, 8), torch.zeros(6, 3), 2.0))
    assert values.tolist() == [0, 0, 0]
    assert effective_rank(values) == 0
    assert energy(values).tolist() == [1, 1, 1]
    assert rank_for_energy(values, 0.9) == 1
    assert truncation_error(values, 1) == 0


# --- effective rank and energy ---


@pytest.mark.parametrize("count", [1, 2, 7])
def test_effective_rank_of_equal_values_is_their_number(count: int) -> None:
    values = torch.cat([torch.full((count,), 0.3), torch.zeros(4)])
    assert effective_rank(values) == pytest.approx(count, rel=1e-12)


def test_effective_rank_of_three_to_one() -> None:
    """By hand: p = 3/4, 1/4, so exp(H) = (4/3)^(3/4) · 4^(1/4)."""
    expected = (4 / 3) ** 0.75 * 4**0.25
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(expected, rel=1e-12)


values_of = st.lists(st.floats(0.001, 1000), min_size=1, max_size=12).map(
    lambda xs: torch.tensor(sorted(xs, reverse=True)).double()
)


@repeatable
@given(values=values_of, factor=st.floats(0.01, 100))
def test_effective_rank_is_bounded_by_the_rank_and_scale_invariant(
    values: Tensor, factor: float
) -> None:
    found = effective_rank(values)
    assert 1 - 1e-12 <= found <= len(values) + 1e-9
    assert effective_rank(factor * values) == pytest.approx(found, rel=1e-9)


@repeatable
@given(values=values_of)
def test_energy_increases_to_one_and_the_error_is_its_complement(values: Tensor) -> None:
    fractions = energy(values)
    assert (fractions.diff() >= 0).all()
    assert fractions[-1] == 1
    squares = [value * value for value in values.tolist()]
    for rank, fraction in enumerate(fractions.tolist(), start=1):
        assert fraction == pytest.approx(sum(squares[:rank]) / sum(squares), rel=1e-12)
        assert truncation_error(values, rank) ** 2 == pytest.approx(1 - fraction, abs=1e-12)


@repeatable
@given(values=values_of, fraction=st.floats(0.01, 1))
def test_rank_for_energy_is_the_smallest(values: Tensor, fraction: float) -> None:
    rank = rank_for_energy(values, fraction)
    fractions = energy(values)
    assert fractions[rank - 1] >= fraction
    assert rank == 1 or fractions[rank - 2] < fraction


def test_energy_by_hand() -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert energy(values).tolist() == pytest.approx([4 / 6, 5 / 6, 1, 1])
    ranks = [rank_for_energy(values, fraction) for fraction in (0.5, 0.7, 0.9, 1.0)]
    assert ranks == [1, 2, 3, 3]


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, math.nan])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="fraction="):
        rank_for_energy(torch.ones(3), fraction)
