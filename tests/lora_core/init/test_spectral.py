"""Initialization from the weight matches PEFT and the best approximations."""

import math

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import ConfigError, LoraConfig
from lora_core.base.nf4 import Nf4Settings, round_to_nf4
from lora_core.init.random import generator_for
from lora_core.init.spectral import FactorPair, olora, pissa, plain_pair, residual_init

SHAPES = [(20, 12), (12, 20), (16, 16)]


class Wrapped(nn.Module):
    """A model with one linear layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.proj = nn.Linear(weight.shape[1], weight.shape[0])
        self.proj.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def tail(matrix: Tensor, rank: int) -> float:
    """Return the error of the best approximation of this rank (Eckart and Young)."""
    return torch.linalg.svdvals(matrix.double())[rank:].norm().item()


def error_of(matrix: Tensor, pair: FactorPair, scale: float) -> float:
    """Return ‖matrix − scale · B A‖."""
    a, b = pair
    return (matrix.double() - scale * b.double() @ a.double()).norm().item()


def layer_output(
    x: Tensor, weight: Tensor, trained: FactorPair, initial: FactorPair, scale: float
) -> Tensor:
    """Return x W0ᵀ + s · (x Aᵀ Bᵀ − x A0ᵀ B0ᵀ)."""
    a, b = trained
    a0, b0 = initial
    return F.linear(x, weight) + scale * (x @ a.T @ b.T - x @ a0.T @ b0.T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_pissa_is_best_approximation(shape: tuple[int, int], scale: float) -> None:
    weight = torch.randn(shape)
    for rank in (1, 5, 12):
        a, b = pair = pissa(weight, rank, scale, generator=generator_for("x", 0))
        assert a.is_contiguous() and b.is_contiguous()
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        assert a.dtype == b.dtype == torch.float32
        # The factors are rounded to float32.
        expected = pytest.approx(tail(weight, rank), rel=1e-6, abs=1e-5)
        assert error_of(weight, pair, scale) == expected
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=1e-6)


def test_more_iterations_come_closer_to_best_approximation() -> None:
    """The spectrum falls slowly, so that the random start alone is not accurate."""
    left = torch.linalg.qr(torch.randn(100, 100)).Q
    right = torch.linalg.qr(torch.randn(100, 100)).Q
    weight = left * torch.arange(1, 101) ** -0.5 @ right

    def excess_error(iterations: int) -> float:
        generator = generator_for("x", 0)
        pair = pissa(weight, 8, 2.0, iterations=iterations, generator=generator)
        return error_of(weight, pair, 2.0) / tail(weight, 8) - 1

    none, few, many = excess_error(0), excess_error(2), excess_error(16)
    assert none > few > many > -1e-6
    assert none > 0.02
    assert many < 1e-4


def test_iterations_over_all_directions_are_exact() -> None:
    """A rank of 4 and 8 extra directions cover all 11 directions."""
    weight = torch.randn(14, 11)
    pair = pissa(weight, 4, 1.0, iterations=0, generator=generator_for("x", 0))
    assert error_of(weight, pair, 1.0) == pytest.approx(tail(weight, 4), rel=1e-6)


def test_iterations_use_only_the_given_generator() -> None:
    weight = torch.randn(60, 50)
    state = torch.get_rng_state()

    def approximate(name: str) -> Tensor:
        a, _ = pissa(weight, 4, 1.0, iterations=1, generator=generator_for(name, 0))
        return a

    first = approximate("x")
    assert torch.equal(first, approximate("x"))
    assert not torch.equal(first, approximate("y"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_olora_is_projection_onto_first_columns(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).double()
    for rank in (1, 5, 12):
        a, b = olora(weight, rank)
        assert a.is_contiguous() and b.is_contiguous()
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        torch.testing.assert_close(b.T @ b, torch.eye(rank), rtol=0, atol=1e-6)
        columns = weight[:, :rank]
        projected = columns @ torch.linalg.lstsq(columns, weight).solution
        # Sums of 12 float32 products.
        torch.testing.assert_close((b @ a).double(), projected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_output_and_gradients_at_step_0_match_peft(shape: tuple[int, int], method: str) -> None:
    """PEFT changes the base to W0 − s·B0·A0; here the layer subtracts the initial pair."""
    rank, scale = 4, 0.5
    x = torch.randn(7, shape[1])
    weight = matrix_with_separate_singular_values(shape)
    config = PeftLoraConfig(r=rank, lora_alpha=2, target_modules=["proj"], init_lora_weights=method)
    model = get_peft_model(Wrapped(weight), config)
    layer = model.base_model.model.proj
    their_a = layer.lora_A["default"].weight
    their_b = layer.lora_B["default"].weight
    if method == "pissa":
        initial = pissa(weight, rank, scale, generator=generator_for("x", 0))
    else:
        initial = olora(weight, rank)
    a, b = (factor.clone().requires_grad_() for factor in initial)

    ours = layer_output(x, weight, (a, b), initial, scale)
    theirs = model(x) - layer.base_layer.bias
    gradient = torch.randn_like(ours)
    ours.backward(gradient)
    theirs.backward(gradient)

    assert torch.equal(ours.detach(), F.linear(x, weight))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    # The sign of a singular direction is arbitrary.
    signs = (b * their_b).sum(0).sign().detach()
    torch.testing.assert_close(a.detach(), their_a.detach() * signs[:, None], rtol=0, atol=1e-5)
    torch.testing.assert_close(b.detach(), their_b.detach() * signs, rtol=0, atol=1e-5)
    assert_close_to_largest(a.grad, their_a.grad * signs[:, None])
    assert_close_to_largest(b.grad, their_b.grad * signs)


def matrix_with_separate_singular_values(shape: tuple[int, int]) -> Tensor:
    """Return a matrix whose directions are accurate in float32, in which PEFT decomposes it.

    A direction has an error of 1e-7 divided by the gap to its neighbors.
    """
    left = torch.linalg.qr(torch.randn(shape[0], 12)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 12)).Q
    return left * 2.0 ** -torch.arange(12) @ right.T


def assert_close_to_largest(actual: Tensor, expected: Tensor) -> None:
    """Compare with a tolerance relative to the largest expected entry."""
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_residual_init_brings_4_bit_weight_closest_to_original(scale: float) -> None:
    original = 0.02 * torch.randn(128, 64)
    stored = round_to_nf4(original, Nf4Settings())
    quantization_error = original - stored
    for rank in (4, 16, 64):
        a, b = residual_init(original, stored, rank, scale)
        assert a.dtype == b.dtype == torch.float32
        remaining = error_of(quantization_error, (a, b), scale)
        assert remaining < quantization_error.norm().item()
        assert remaining == pytest.approx(tail(quantization_error, rank), rel=1e-5, abs=1e-6)


def test_residual_init_of_equal_or_different_weights_raises() -> None:
    weight = torch.randn(6, 4)
    with pytest.raises(ConfigError, match="the quantization error is zero"):
        residual_init(weight, weight.clone(), 2, 1.0)
    with pytest.raises(ConfigError, match=r"\(6, 4\) and \(4, 6\)"):
        residual_init(weight, weight.T, 2, 1.0)


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range_raises(rank: int) -> None:
    weight = torch.randn(6, 4)
    message = f"rank {rank} of a 6×4 matrix must be from 1 to 4"
    with pytest.raises(ConfigError, match=message):
        pissa(weight, rank, 1.0, generator=generator_for("x", 0))
    with pytest.raises(ConfigError, match=message):
        olora(weight, rank)
    with pytest.raises(ConfigError, match=message):
        residual_init(weight, -weight, rank, 1.0)


@pytest.mark.parametrize("iterations", [-1, 1.5, True])
def test_invalid_iterations_raise(iterations: object) -> None:
    with pytest.raises(ConfigError, match=f"iterations={iterations}"):
        pissa(torch.randn(6, 4), 2, 1.0, iterations=iterations, generator=generator_for("x", 0))


# --- one adapter of the unchanged base ---


@pytest.mark.parametrize("rslora", [False, True])
def test_plain_pair_is_difference_at_same_scale(rslora: bool) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora)
    factor_of_alpha = math.sqrt(2) if rslora else 2
    plain = LoraConfig(r=8, lora_alpha=6 * factor_of_alpha, use_rslora=rslora)
    assert plain.scale == pytest.approx(config.scale, rel=1e-15)
    weight = torch.randn(20, 12)
    x = torch.randn(7, 12)
    initial = pissa(weight, 4, config.scale, generator=generator_for("x", 0))
    trained = tuple(factor + 0.1 * torch.randn_like(factor) for factor in initial)
    a, b = plain_pair(*trained, *initial)
    assert (a.shape, b.shape) == ((8, 12), (20, 8))
    found = F.linear(x, weight) + plain.scale * (x @ a.T @ b.T)
    expected = layer_output(x, weight, trained, initial, config.scale)
    # The sums are in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
