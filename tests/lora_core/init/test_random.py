"""Random initialization depends on name and seed only, and has the published distributions."""

import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import ConfigError, LoraConfig, inject, lora_layers
from lora_core.init.random import generator_for, initial_a, orthogonal

NAME = "model.layers.1.self_attn.q_proj"
Build = Callable[..., LlamaForCausalLM]


def drawn(
    model: nn.Module, seed: int, targets: str | tuple[str, ...] = "all-linear"
) -> dict[str, Tensor]:
    """Inject an adapter and return A of each layer."""
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets), seed=seed)
    return {name: layer.lora_A.detach() for name, layer in lora_layers(model)}


def test_a_does_not_depend_on_other_targets(
    build_llama: Build,
) -> None:
    every = drawn(build_llama(), seed=3)
    alone = drawn(build_llama(), seed=3, targets=(NAME,))
    assert list(alone) == [NAME]
    assert torch.equal(alone[NAME], every[NAME])


def test_a_does_not_depend_on_global_generator(
    build_llama: Build,
) -> None:
    first = drawn(build_llama(), seed=3)
    torch.manual_seed(999)
    model = build_llama()
    torch.rand(17)
    assert torch.equal(drawn(model, seed=3)[NAME], first[NAME])


def test_a_does_not_depend_on_wrapper(
    build_llama: Build, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    wrapped = drawn(wrapper(build_llama()), seed=3)
    plain = drawn(build_llama(), seed=3)
    assert torch.equal(wrapped[NAME], plain[NAME])


def test_injection_does_not_use_global_generator(
    build_llama: Build,
) -> None:
    model = build_llama()
    before = torch.get_rng_state()
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_depends_on_name_and_seed(
    build_llama: Build,
) -> None:
    first = drawn(build_llama(), seed=3)
    second = drawn(build_llama(), seed=4)
    assert not torch.equal(first[NAME], second[NAME])
    assert not torch.equal(first[NAME], first["model.layers.0.self_attn.q_proj"])


def test_b_is_zero_and_factors_are_float32(build_llama: Build) -> None:
    model = build_llama(dtype=torch.bfloat16)
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=3)
    for _, layer in lora_layers(model):
        assert torch.count_nonzero(layer.lora_B) == 0
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


@pytest.mark.parametrize("in_features", [64, 1024])
def test_kaiming_matches_reference_distribution(in_features: int) -> None:
    a = initial_a(256, in_features, "kaiming", generator_for("x", 0))
    reference = nn.init.kaiming_uniform_(torch.empty(256, in_features), a=5**0.5)
    bound = 1 / in_features**0.5
    assert a.abs().max() <= bound
    # With 16,384 draws or more, a maximum below 0.99 of the bound has a probability under 1e-70.
    assert a.abs().max() > 0.99 * bound
    # The standard deviation of n uniform draws has a relative error of 1/√(5n/4) ≈ 0.7 %; the
    # tolerance is five times that for each of the two samples.
    torch.testing.assert_close(a.std(), reference.std(), rtol=0.07, atol=0)


@pytest.mark.parametrize("rank", [4, 64])
def test_gaussian_has_standard_deviation_of_one_over_r(rank: int) -> None:
    a = initial_a(rank, 4096, "gaussian", generator_for("x", 0))
    # The standard deviation of n draws has a relative error of 1/√(2n), 0.6 % for 16,384 draws;
    # the tolerance is six times that.
    assert abs(a.std().item() * rank - 1) < 0.035
    assert abs(a.mean().item() * rank) < 0.05
    assert a.abs().max() > 3 / rank  # a uniform distribution would end at √3 deviations


# --- orthogonal ---


@pytest.mark.parametrize("rank", [2, 8, 64])
def test_orthogonal_factors_are_nonzero_with_zero_product(rank: int) -> None:
    a, b = orthogonal(rank, (300, 200), generator_for("x", 0))
    assert (a.shape, b.shape) == ((rank, 200), (300, rank))
    assert a.dtype == b.dtype == torch.float32
    # Sums of r products of entries of about 0.07, each rounded to 6e-8 of itself.
    assert (b @ a).abs().max() < 1e-7 * math.sqrt(rank)
    # Each factor spans half of the directions.
    assert torch.linalg.matrix_rank(a) == rank // 2
    assert torch.linalg.matrix_rank(b) == rank // 2


def norms_of(*factors: Tensor) -> list[float]:
    return [factor.detach().norm().item() for factor in factors]


def test_orthogonal_has_distribution_of_peft() -> None:
    """The norms of A and B have the same mean and standard deviation over many draws."""
    settings = PeftLoraConfig(r=4, target_modules=["proj"])
    model = nn.ModuleDict({"proj": nn.Linear(30, 40)})
    layer = get_peft_model(model, settings).base_model.model.proj
    ours = []
    theirs = []
    for draw in range(400):
        layer.orthogonal_init("default")
        ours.append(norms_of(*orthogonal(4, (40, 30), generator_for(str(draw), 0))))
        theirs.append(norms_of(layer.lora_A["default"].weight, layer.lora_B["default"].weight))
    our_norms = torch.tensor(ours)
    their_norms = torch.tensor(theirs)
    # A norm varies by about 1/√(2·entries/2) = 9 % from draw to draw. With 400 draws, the mean has
    # an error of 0.5 %, the standard deviation one of 3.5 %.
    torch.testing.assert_close(our_norms.mean(0), their_norms.mean(0), rtol=0.03, atol=0)
    torch.testing.assert_close(our_norms.std(0), their_norms.std(0), rtol=0.25, atol=0)
    a, _ = orthogonal(64, (8, 4096), generator_for("x", 0))
    assert a.std().item() * math.sqrt(200) == pytest.approx(1, abs=0.02)


def test_orthogonal_factors_both_get_gradients() -> None:
    a, b = orthogonal(4, (20, 12), generator_for("x", 0))
    a.requires_grad_()
    b.requires_grad_()
    (torch.randn(5, 12) @ a.T @ b.T).sum().backward()
    assert a.grad.abs().max() > 1e-3
    assert b.grad.abs().max() > 1e-3


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_orthogonal_with_odd_rank_raises(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} must be even .* use {max(rank, 1) + 1}"):
        orthogonal(rank, (20, 12), generator_for("x", 0))
