"""A dequantized model is dense and computes what the 4-bit model computed."""

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import LoraConfig, TargetError, inject, merge
from lora_core.base.quant import quantized_kind
from lora_core.merging.dequantize import dequantize

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    "targets", [None, ("q_proj",), "all-linear"], ids=["plain", "partly adapted", "adapted"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_bit_exact(
    build_nf4_llama: Build,
    randomize: Callable[[nn.Module], None],
    logits: Logits,
    dtype: torch.dtype,
    targets: str | tuple[str, ...] | None,
) -> None:
    model = build_nf4_llama(dtype)
    if targets is not None:
        inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets), seed=0)
        randomize(model)
    before = logits(model)
    assert dequantize(model, dtype) == 14
    assert not any(quantized_kind(module) == "nf4" for module in model.modules())
    assert torch.equal(logits(model), before)


def test_dequantized_model_can_be_merged(
    build_nf4_llama: Build, randomize: Callable[[nn.Module], None], logits: Logits
) -> None:
    model = build_nf4_llama()
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=0)
    randomize(model)
    before = logits(model)
    dequantize(model, torch.float32)
    merge(model)
    # One rounding of 6e-8 for each weight, through two layers.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 * before.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_has_the_new_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(bnb.nn.Linear4bit(64, 96, bias=True, quant_type="nf4").to("cpu"))
    x = torch.randn(5, 64, dtype=dtype)
    dequantize(model, dtype)
    dense = model[0](x)
    assert dense.dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept_and_weights_are_frozen(
    build_nf4_llama: Build, training: bool
) -> None:
    model = build_nf4_llama().train(training)
    linear = [name for name, module in model.named_modules() if quantized_kind(module) == "nf4"]
    dequantize(model, torch.float32)
    assert all(module.training is training for module in model.modules())
    assert not any(model.get_parameter(f"{name}.weight").requires_grad for name in linear)


def test_dense_model_does_not_change(
    build_llama: Build,
    state_of: Callable[..., dict[str, Tensor]],
    assert_same_state: Callable[..., None],
) -> None:
    model = build_llama()
    before = state_of(model)
    assert dequantize(model, torch.float32) == 0
    assert_same_state(state_of(model), before)


def test_wrapped_model_is_dequantized(
    build_nf4_llama: Build, logits: Logits, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    model = build_nf4_llama()
    before = logits(model)
    assert dequantize(wrapper(model), torch.float32) == 14
    assert torch.equal(logits(model), before)


def test_evaluated_base_is_refused_or_dequantized_correctly(
    build_nf4_llama: Build, logits: Logits
) -> None:
    """See test_quant.py: evaluation can reorder the codes, which would then be read as noise."""
    model = build_nf4_llama()
    reference = logits(model)
    logits(model.eval())
    try:
        dequantize(model, torch.float32)
    except TargetError:
        return
    tolerance = 0.02 * reference.abs().max().item()
    torch.testing.assert_close(logits(model), reference, rtol=0, atol=tolerance)
