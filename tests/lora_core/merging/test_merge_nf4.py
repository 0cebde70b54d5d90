"""A merge into NF4 is refused unless it is forced, and unmerge restores every bit of the base."""

from collections.abc import Callable

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import LoraConfig, MergeError, fingerprint, inject, lora_layers, merge, unmerge

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
CONFIG = LoraConfig(r=4, lora_alpha=8)


def test_nf4_is_refused(build_nf4_llama: Build, refuses: Callable[..., None]) -> None:
    model = build_nf4_llama()
    inject(model, CONFIG, seed=0)
    refuses(
        model, lambda: merge(model), MergeError, "model.layers.0.self_attn.q_proj is stored in nf4"
    )


def test_forced_merge_into_nf4_quantizes_the_sum_with_the_same_settings(
    build_nf4_llama: Build, randomize: Callable[..., None]
) -> None:
    """The reference is bitsandbytes' rounding of W0 + s·B·A; dtype and block size do not change."""
    model = build_nf4_llama(torch.bfloat16)
    inject(model, CONFIG, seed=0)
    randomize(model)
    sums, states = {}, {}
    for name, layer in lora_layers(model):
        sums[name] = layer.frozen.dense(torch.float32) + layer.delta()
        states[name] = layer.base.weight.quant_state
    merged = merge(model, force=True)
    for name, total in sums.items():
        weight = model.get_submodule(name).weight
        found = weight.quant_state
        codes, state = quantize_4bit(
            total, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(weight.data, codes)
        expected = dequantize_4bit(codes, state).bfloat16()
        assert torch.equal(dequantize_4bit(weight.data, found).float(), expected.float())
        assert (found.blocksize, found.nested) == (64, True)
        assert (found.dtype, found.shape) == (states[name].dtype, states[name].shape)
        assert found is not states[name]
        assert model.get_submodule(name).quant_state is found
    assert merged.retention.keys() == sums.keys()
    # The noise in the adapter is as large as the weight.
    assert all(0.5 < each.fraction < 1.5 for each in merged.retention.values())


def test_unmerge_restores_every_bit_of_an_nf4_base(
    build_nf4_llama: Build,
    randomize: Callable[..., None],
    logits: Logits,
    state_of: Callable[..., dict[str, Tensor]],
    assert_same_state: Callable[..., None],
) -> None:
    model = build_nf4_llama()
    inject(model, CONFIG, seed=0)
    randomize(model)
    before = logits(model)
    state = state_of(model)
    digest = fingerprint(model)
    merged = merge(model, force=True)
    assert fingerprint(model) != digest
    assert not torch.equal(logits(model), before)
    unmerge(model, merged)
    assert_same_state(state_of(model), state)
    assert fingerprint(model) == digest
    assert torch.equal(logits(model), before)


def test_force_has_no_effect_on_a_dense_base(
    adapt: Build, state_of: Callable[..., dict[str, Tensor]]
) -> None:
    forced = adapt()
    plain = adapt()
    assert merge(forced, force=True).retention == {}
    assert merge(plain).retention == {}
    expected = state_of(plain)
    assert all(torch.equal(value, expected[name]) for name, value in state_of(forced).items())


def test_forced_merge_of_a_sum_that_is_not_finite_is_refused(
    build_nf4_llama: Build, refuses: Callable[..., None]
) -> None:
    model = build_nf4_llama()
    inject(model, CONFIG, seed=0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B.fill_(torch.inf)
    refuses(
        model,
        lambda: merge(model, force=True),
        MergeError,
        "layers.1.mlp.up_proj: the merged weight is not finite",
    )
