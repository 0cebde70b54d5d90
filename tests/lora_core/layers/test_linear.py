"""LoraLinear equals its base at step 0, computes W x + s·B·A·x and trains only A and B."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import LoraConfig, inject, lora_layers, trained_weights

CONFIG = LoraConfig(r=4, lora_alpha=8)


@pytest.fixture
def layer(randomize: Callable[[nn.Module], None]) -> nn.Module:
    """One adapted layer with a bias, noise in B and dropout."""
    model = nn.ModuleDict({"fc": nn.Linear(24, 40)})
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=("fc",), lora_dropout=0.5), seed=0)
    randomize(model)
    return model["fc"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_zero_is_the_base_bit_for_bit(
    build_llama: Callable[..., LlamaForCausalLM],
    logits: Callable[[nn.Module], Tensor],
    dtype: torch.dtype,
    bias: bool,
    training: bool,
) -> None:
    model = build_llama(dtype=dtype, bias=bias).train(training)
    before = logits(model)
    inject(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3), seed=0)
    assert torch.equal(logits(model), before)


def test_forward_is_the_dense_sum(layer: nn.Module) -> None:
    layer.eval()
    x = torch.randn(3, 5, 24)
    weight = layer.base.weight.double() + 2.0 * (layer.lora_B.double() @ layer.lora_A.double())
    expected = x.double() @ weight.T + layer.base.bias.double()
    # float32 over sums of 24 + 4 terms of about 1.
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        layer.delta().double(), weight - layer.base.weight.double(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("module", [nn.Linear(8, 8), nn.Conv2d(8, 8, 1)], ids=["linear", "conv"])
def test_zero_row_has_zero_norm_under_dora_and_can_learn(module: nn.Module) -> None:
    """As in padding rows of a vocabulary or a zero-initialized layer: 0 / 0 must not occur."""
    with torch.no_grad():
        module.weight[2].zero_()
    model = nn.ModuleDict({"fc": module})
    x = torch.randn(4, 8) if isinstance(module, nn.Linear) else torch.randn(4, 8, 2, 2)
    before = module(x)
    inject(model, LoraConfig(r=2, lora_alpha=2, target_modules=("fc",), use_dora=True), seed=0)
    # A row times its norm over its norm: two roundings of 6e-8.
    torch.testing.assert_close(model["fc"](x), before, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        model["fc"].lora_B.normal_()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(model["fc"](x).sum(), trained)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert gradients[-1].flatten()[2] != 0  # the norm of that row


def test_dropout_acts_in_training_only(layer: nn.Module) -> None:
    x = torch.randn(64, 24)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_adapter_gets_gradients(
    build_llama: Callable[..., LlamaForCausalLM], tokens: Tensor, tied: bool
) -> None:
    model = build_llama(tied=tied)
    targets = inject(model, CONFIG, seed=0)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    with_gradient = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert with_gradient == {
        f"{target.name}.lora_{letter}" for target in targets for letter in "AB"
    }
    # B is zero, so only the gradient of B can be nonzero at the first step.
    assert all(layer.lora_B.grad.abs().max() > 0 for _, layer in lora_layers(model))


def test_trained_weights_are_counted(build_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = build_llama()
    targets = inject(model, CONFIG, seed=0)
    # In each of 2 layers: q and o 64→64, k and v 64→32, gate and up 64→128, down 128→64.
    expected = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert trained_weights(model) == sum(target.trained_weights for target in targets) == expected


def test_optimizer_step_changes_only_the_adapter(
    build_llama: Callable[..., LlamaForCausalLM],
    tokens: Tensor,
    state_of: Callable[[nn.Module], dict[str, Tensor]],
) -> None:
    model = build_llama()
    inject(model, CONFIG, seed=0)
    before = state_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    changed = {
        name for name, value in state_of(model).items() if not torch.equal(value, before[name])
    }
    # A's gradient is zero while B is zero.
    assert changed == {f"{name}.lora_B" for name, _ in lora_layers(model)}


def test_deep_copy_is_independent(layer: nn.Module) -> None:
    layer.eval()
    x = torch.randn(2, 24)
    before = layer(x)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        copied.base.weight.zero_()
    assert torch.equal(layer(x), before)
    assert not torch.equal(copied(x), before)


def test_casting_the_model_casts_the_layer(layer: nn.Module) -> None:
    layer.eval().to(torch.float64)
    assert layer(torch.randn(2, 24, dtype=torch.float64)).dtype == torch.float64


def test_repr_names_rank_scale_and_storage(layer: nn.Module) -> None:
    assert "rank=4, scale=2, base=dense" in repr(layer)
