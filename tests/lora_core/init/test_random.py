"""Where A and B start: by name and seed alone, in the published distributions, or from the weight as PEFT takes it."""

import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from lora_core import ConfigError, LoraConfig, inject, lora_layers
from lora_core.base.nf4 import Nf4Settings, rounded_to_nf4
from lora_core.init.random import generator_for, initial_a, orthogonal
from lora_core.init.spectral import Pair, olora, pissa, plain_pair, residual_start

NAME = "model.layers.1.self_attn.q_proj"
SHAPES = [(20, 12), (12, 20), (16, 16)]


def drawn(
    model: nn.Module, seed: int, targets: str | tuple[str, ...] = "all-linear"
) -> dict[str, Tensor]:
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets), seed=seed)
    return {name: layer.lora_A.detach() for name, layer in lora_layers(model)}


def test_a_does_not_depend_on_the_other_targets(
    build_llama: Callable[..., LlamaForCausalLM],
) -> None:
    every = drawn(build_llama(), seed=3)
    alone = drawn(build_llama(), seed=3, targets=(NAME,))
    assert list(alone) == [NAME]
    assert torch.equal(alone[NAME], every[NAME])


def test_a_does_not_depend_on_the_global_generator(
    build_llama: Callable[..., LlamaForCausalLM],
) -> None:
    first = drawn(build_llama(), seed=3)
    torch.manual_seed(999)
    model = build_llama()
    torch.rand(17)
    assert torch.equal(drawn(model, seed=3)[NAME], first[NAME])


def test_a_does_not_depend_on_a_wrapper(
    build_llama: Callable[..., LlamaForCausalLM], wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    assert torch.equal(
        drawn(wrapper(build_llama()), seed=3)[NAME], drawn(build_llama(), seed=3)[NAME]
    )


def test_injection_leaves_the_global_generator_alone(
    build_llama: Callable[..., LlamaForCausalLM],
) -> None:
    model = build_llama()
    before = torch.get_rng_state()
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_name_or_other_seed_gives_another_a(
    build_llama: Callable[..., LlamaForCausalLM],
) -> None:
    first, second = drawn(build_llama(), seed=3), drawn(build_llama(), seed=4)
    assert not torch.equal(first[NAME], second[NAME])
    assert not torch.equal(first[NAME], first["model.layers.0.self_attn.q_proj"])


def test_b_is_zero_and_both_are_float32(build_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = build_llama(dtype=torch.bfloat16)
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=3)
    for _, layer in lora_layers(model):
        assert torch.count_nonzero(layer.lora_B) == 0
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


@pytest.mark.parametrize("in_features", [64, 1024])
def test_kaiming_fills_the_interval_of_the_reference_evenly(in_features: int) -> None:
    a = initial_a(256, in_features, "kaiming", generator_for("x", 0))
    reference = nn.init.kaiming_uniform_(torch.empty(256, in_features), a=5**0.5)
    bound = 1 / in_features**0.5
    assert a.abs().max() <= bound
    # 16,384 draws or more: a maximum below 0.99 of the bound has a chance under 1e-70.
    assert a.abs().max() > 0.99 * bound
    # A uniform sample of n has a deviation known to 1/√(5n/4) ≈ 0.7 %; five of those for each of the two samples.
    torch.testing.assert_close(a.std(), reference.std(), rtol=0.07, atol=0)


@pytest.mark.parametrize("rank", [4, 64])
def test_gaussian_has_a_standard_deviation_of_one_over_r(rank: int) -> None:
    a = initial_a(rank, 4096, "gaussian", generator_for("x", 0))
    # The deviation of n draws is known to 1/√(2n): 0.6 % at 16,384 draws; six of those.
    assert abs(a.std().item() * rank - 1) < 0.035
    assert abs(a.mean().item() * rank) < 0.05
    assert a.abs().max() > 3 / rank  # a uniform sample of this deviation would end at √3


# --- orthogonal ---


@pytest.mark.parametrize("rank", [2, 8, 64])
def test_orthogonal_factors_are_not_zero_and_their_product_is(rank: int) -> None:
    a, b = orthogonal(rank, (300, 200), generator_for("x", 0))
    assert (a.shape, b.shape, a.dtype, b.dtype) == (
        (rank, 200),
        (300, rank),
        torch.float32,
        torch.float32,
    )
    # r products of entries of 0.07 each, rounded to 6e-8 of themselves
    assert (b @ a).abs().max() < 1e-7 * math.sqrt(rank)
    assert (
        torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == rank // 2
    )  # each fills its half of the directions


def test_an_orthogonal_start_has_the_distribution_of_peft() -> None:
    """Over many draws: the deviation of the entries, and that of one start's norm from another's."""
    layer = get_peft_model(
        Wrapped(torch.randn(40, 30)), PeftLoraConfig(r=4, target_modules=["proj"])
    ).base_model.model.proj
    norms = []
    for draw in range(400):
        layer.orthogonal_init("default")
        ours = orthogonal(4, (40, 30), generator_for(str(draw), 0))
        theirs = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        norms.append(
            [[factor.detach().norm().item() for factor in pair] for pair in (ours, theirs)]
        )
    norms_DPF = torch.tensor(norms)  # draw, ours or PEFT's, A or B
    # A norm varies by about 1/√(2·entries/2) = 9 % from draw to draw: a mean of 400 is known to 0.5 %, its deviation to 3.5 %.
    torch.testing.assert_close(norms_DPF[:, 0].mean(0), norms_DPF[:, 1].mean(0), rtol=0.03, atol=0)
    torch.testing.assert_close(norms_DPF[:, 0].std(0), norms_DPF[:, 1].std(0), rtol=0.25, atol=0)
    a = orthogonal(64, (8, 4096), generator_for("x", 0))[0]
    assert a.std().item() * math.sqrt(200) == pytest.approx(1, abs=0.02)


def test_an_orthogonal_start_gives_both_factors_a_gradient() -> None:
    a, b = (factor.requires_grad_() for factor in orthogonal(4, (20, 12), generator_for("x", 0)))
    (torch.randn(5, 12) @ a.T @ b.T).sum().backward()
    assert a.grad.abs().max() > 1e-3
    assert b.grad.abs().max() > 1e-3


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_an_odd_rank_cannot_be_halved(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} must be even .* use {max(rank, 1) + 1}"):
        orthogonal(rank, (20, 12), generator_for("x", 0))


# --- from the weight ---


class Wrapped(nn.Module):
    """A model of one linear layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.proj = nn.Linear(weight.shape[1], weight.shape[0])
        self.proj.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def tail(matrix: Tensor, rank: int) -> float:
    """Return what the best approximation of that rank loses (Eckart and Young)."""
    return torch.linalg.svdvals(matrix.double())[rank:].norm().item()


def lost(matrix: Tensor, pair: Pair, scale: float) -> float:
    a, b = pair
    return (matrix.double() - scale * b.double() @ a.double()).norm().item()


def beside_the_start(x: Tensor, weight: Tensor, trained: Pair, start: Pair, scale: float) -> Tensor:
    """The layer: x W0ᵀ + s · (x Aᵀ Bᵀ − x A0ᵀ B0ᵀ)."""
    (a, b), (a0, b0) = trained, start
    return F.linear(x, weight) + scale * (x @ a.T @ b.T - x @ a0.T @ b0.T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_pissa_takes_the_best_approximation(shape: tuple[int, int], scale: float) -> None:
    weight = torch.randn(shape)
    for rank in (1, 5, 12):
        a, b = pair = pissa(weight, rank, scale, generator=generator_for("x", 0))
        assert a.is_contiguous() and b.is_contiguous()
        assert (a.shape, b.shape, a.dtype, b.dtype) == (
            (rank, shape[1]),
            (shape[0], rank),
            torch.float32,
            torch.float32,
        )
        assert lost(weight, pair, scale) == pytest.approx(
            tail(weight, rank), rel=1e-6, abs=1e-5
        )  # factors rounded to float32
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=1e-6)


def test_iterations_come_close_to_the_best_approximation_and_more_come_closer() -> None:
    """A spectrum that falls slowly, so that the random start alone is not enough."""
    left, right = (torch.linalg.qr(torch.randn(100, 100)).Q for _ in range(2))
    weight = left * torch.arange(1, 101) ** -0.5 @ right
    excess = [
        lost(weight, pissa(weight, 8, 2.0, iterations=n, generator=generator_for("x", 0)), 2.0)
        / tail(weight, 8)
        - 1
        for n in (0, 2, 16)
    ]
    assert excess[0] > excess[1] > excess[2] > -1e-6
    assert excess[0] > 0.02
    assert excess[2] < 1e-4


def test_iterations_over_every_direction_are_exact() -> None:
    weight = torch.randn(14, 11)
    found = pissa(
        weight, 4, 1.0, iterations=0, generator=generator_for("x", 0)
    )  # 4 + 8 directions of 11
    assert lost(weight, found, 1.0) == pytest.approx(tail(weight, 4), rel=1e-6)


def test_iterations_draw_from_the_generator_alone() -> None:
    weight, state = torch.randn(60, 50), torch.get_rng_state()
    first, again, other = (
        pissa(weight, 4, 1.0, iterations=1, generator=generator_for(name, 0)) for name in "xxy"
    )
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_olora_takes_the_projection_onto_the_first_columns(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).double()
    for rank in (1, 5, 12):
        a, b = olora(weight, rank)
        assert a.is_contiguous() and b.is_contiguous()
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        torch.testing.assert_close(b.T @ b, torch.eye(rank), rtol=0, atol=1e-6)
        columns = weight[:, :rank]
        projected = columns @ torch.linalg.lstsq(columns, weight).solution
        torch.testing.assert_close(
            (b @ a).double(), projected, rtol=0, atol=1e-5
        )  # float32 products of 12 terms


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_value_and_gradients_at_step_0_are_those_of_peft(
    shape: tuple[int, int], method: str
) -> None:
    """PEFT changes the base to W0 − s·B0·A0; here the start is subtracted in the layer."""
    rank, scale, x = 4, 0.5, torch.randn(7, shape[1])
    # singular values well apart: PEFT decomposes in float32, which knows a direction to 1e-7 over the gap beside it
    weight = (
        torch.linalg.qr(torch.randn(shape[0], 12)).Q
        * 2.0 ** -torch.arange(12)
        @ torch.linalg.qr(torch.randn(shape[1], 12)).Q.T
    )
    config = PeftLoraConfig(r=rank, lora_alpha=2, target_modules=["proj"], init_lora_weights=method)
    model = get_peft_model(Wrapped(weight), config)
    start = (
        pissa(weight, rank, scale, generator=generator_for("x", 0))
        if method == "pissa"
        else olora(weight, rank)
    )
    trained = tuple(factor.clone().requires_grad_() for factor in start)
    y, theirs = (
        beside_the_start(x, weight, trained, start, scale),
        model(x) - model.base_model.model.proj.base_layer.bias,
    )
    grad = torch.randn_like(y)
    y.backward(grad)
    theirs.backward(grad)

    layer = model.base_model.model.proj
    their_a, their_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    signs = (
        (trained[1].detach() * their_b.detach()).sum(0).sign()
    )  # a singular direction is known up to its sign
    assert torch.equal(y.detach(), F.linear(x, weight))
    torch.testing.assert_close(theirs, y, rtol=0, atol=1e-5)
    for ours, other in zip(trained, (their_a * signs[:, None], their_b * signs), strict=True):
        torch.testing.assert_close(ours.detach(), other.detach(), rtol=0, atol=1e-5)
    for ours, other in zip(
        (trained[0].grad, trained[1].grad),
        (their_a.grad * signs[:, None], their_b.grad * signs),
        strict=True,
    ):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_residual_start_brings_a_4_bit_weight_closest_to_what_it_was(scale: float) -> None:
    original = 0.02 * torch.randn(128, 64)
    stored = rounded_to_nf4(original, Nf4Settings())
    for rank in (4, 16, 64):
        a, b = pair = residual_start(original, stored, rank, scale)
        assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
        remains = lost(original - stored, pair, scale)
        assert remains < (original - stored).norm().item()
        assert remains == pytest.approx(tail(original - stored, rank), rel=1e-5, abs=1e-6)


def test_a_residual_start_of_nothing_or_of_two_weights_is_refused() -> None:
    weight = torch.randn(6, 4)
    with pytest.raises(ConfigError, match="no rounding to make up for"):
        residual_start(weight, weight.clone(), 2, 1.0)
    with pytest.raises(ConfigError, match=r"\(6, 4\) and \(4, 6\)"):
        residual_start(weight, weight.T, 2, 1.0)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_the_weight_does_not_have_is_refused(rank: int) -> None:
    weight, generator = torch.randn(6, 4), generator_for("x", 0)
    starts = [
        lambda: pissa(weight, rank, 1.0, generator=generator),
        lambda: olora(weight, rank),
        lambda: residual_start(weight, -weight, rank, 1.0),
    ]
    for start in starts:
        with pytest.raises(ConfigError, match=f"rank {rank} of a 6×4 matrix must lie in 1 to 4"):
            start()


@pytest.mark.parametrize("iterations", [-1, 1.5, True])
def test_iterations_are_counted(iterations: object) -> None:
    with pytest.raises(ConfigError, match=f"iterations={iterations}"):
        pissa(torch.randn(6, 4), 2, 1.0, iterations=iterations, generator=generator_for("x", 0))


# --- as one adapter of the unchanged base ---


@pytest.mark.parametrize("rslora", [False, True])
def test_a_plain_pair_is_the_difference_at_the_same_scale(rslora: bool) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora)
    plain = LoraConfig(r=8, lora_alpha=6 * (math.sqrt(2) if rslora else 2), use_rslora=rslora)
    assert plain.scale == pytest.approx(config.scale, rel=1e-15)
    weight, x = torch.randn(20, 12), torch.randn(7, 12)
    start = pissa(weight, 4, config.scale, generator=generator_for("x", 0))
    trained = tuple(factor + 0.1 * torch.randn_like(factor) for factor in start)
    a, b = plain_pair(*trained, *start)
    assert (a.shape, b.shape) == ((8, 12), (20, 8))
    found = F.linear(x, weight) + plain.scale * (x @ a.T @ b.T)
    torch.testing.assert_close(
        found, beside_the_start(x, weight, trained, start, config.scale), rtol=0, atol=1e-5
    )  # sums in another order
