"""A depends on the target's name and the seed alone and has the published distribution; B is zero."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import LoraConfig, inject, lora_layers
from lora_core.init import generator_for, initial_a

NAME = "model.layers.1.self_attn.q_proj"


def drawn(model: nn.Module, seed: int, targets: str | tuple[str, ...] = "all-linear") -> dict[str, Tensor]:
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets), seed=seed)
    return {name: layer.lora_A.detach() for name, layer in lora_layers(model)}


def test_a_does_not_depend_on_the_other_targets(build_llama: Callable[..., LlamaForCausalLM]) -> None:
    every = drawn(build_llama(), seed=3)
    alone = drawn(build_llama(), seed=3, targets=(NAME,))
    assert list(alone) == [NAME]
    assert torch.equal(alone[NAME], every[NAME])


def test_a_does_not_depend_on_the_global_generator(build_llama: Callable[..., LlamaForCausalLM]) -> None:
    first = drawn(build_llama(), seed=3)
    torch.manual_seed(999)
    model = build_llama()
    torch.rand(17)
    assert torch.equal(drawn(model, seed=3)[NAME], first[NAME])


def test_a_does_not_depend_on_a_wrapper(build_llama: Callable[..., LlamaForCausalLM], wrapper: Callable[[nn.Module], nn.Module]) -> None:
    assert torch.equal(drawn(wrapper(build_llama()), seed=3)[NAME], drawn(build_llama(), seed=3)[NAME])


def test_injection_leaves_the_global_generator_alone(build_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = build_llama()
    before = torch.get_rng_state()
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_name_or_other_seed_gives_another_a(build_llama: Callable[..., LlamaForCausalLM]) -> None:
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
