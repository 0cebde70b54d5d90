"""A merge keeps the logits and leaves no trace of LoRA; undone, it leaves no trace of itself; refused, it changes nothing."""

from collections.abc import Callable

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    LoraConfig,
    LoraLinear,
    MergeError,
    fingerprint,
    inject,
    lora_layers,
    merge,
    unmerge,
)
from lora_core.modules import replace_module

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
CONFIG = LoraConfig(r=4, lora_alpha=8)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def adapt(build_llama: Build, randomise: Callable[[nn.Module], None]) -> Build:
    """Return a maker of Llamas with an adapter that has noise in it."""

    def make(config: LoraConfig = CONFIG, **options: object) -> LlamaForCausalLM:
        model = build_llama(**options)
        inject(model, config, seed=0)
        randomise(model)
        return model

    return make


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
def test_a_merge_keeps_the_logits(
    adapt: Build, build_llama: Build, logits: Logits, dtype: torch.dtype, tolerance: float
) -> None:
    """About 20 roundings in a row of 6e-8 or 4e-3 each, relative to the largest logit; the update itself moves far more."""
    model = adapt(dtype=dtype)
    before = logits(model).float()
    size = before.abs().max().item()
    merge(model)
    torch.testing.assert_close(logits(model).float(), before, rtol=0, atol=tolerance * size)
    assert (logits(build_llama(dtype=dtype)).float() - before).abs().max() > 0.3 * size


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 24), (torch.bfloat16, 8)], ids=str)
def test_a_merged_weight_is_the_exact_sum_rounded_once(
    adapt: Build, dtype: torch.dtype, digits: int
) -> None:
    model = adapt(dtype=dtype)
    exact = {
        name: layer.base.weight.double() + 2.0 * (layer.lora_B.double() @ layer.lora_A.double())
        for name, layer in lora_layers(model)
    }
    merge(model)
    for name, expected in exact.items():
        found = model.get_submodule(name).weight
        assert found.dtype == dtype
        # Half a unit in the last place, and the float32 rounding of the terms where they cancel.
        torch.testing.assert_close(found.double(), expected, rtol=2.0**-digits, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_after_a_merge_the_model_is_plain(adapt: Build, build_llama: Build, tied: bool) -> None:
    model, plain = (
        adapt(tied=tied, dtype=torch.bfloat16),
        build_llama(tied=tied, dtype=torch.bfloat16),
    )
    merge(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(value.dtype == torch.bfloat16 for value in model.state_dict().values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge_restores_every_bit(
    adapt: Build,
    logits: Logits,
    state_of: Callable[..., dict[str, Tensor]],
    assert_same_state: Callable[..., None],
    dtype: torch.dtype,
) -> None:
    model = adapt(dtype=dtype)
    before, state, layers = logits(model), state_of(model), dict(lora_layers(model))
    merged = merge(model)
    assert not torch.equal(
        merged.parts[next(iter(layers))].base.weight,
        merged.originals[f"{next(iter(layers))}.weight"],
    )
    unmerge(model, merged)
    assert_same_state(state_of(model), state)
    assert dict(lora_layers(model)) == layers
    assert torch.equal(logits(model), before)


def test_many_rounds_do_not_drift(
    adapt: Build, state_of: Callable[..., dict[str, Tensor]], assert_same_state: Callable[..., None]
) -> None:
    model = adapt(dtype=torch.bfloat16)
    before = state_of(model)
    for _ in range(5):
        unmerge(model, merge(model))
    assert_same_state(state_of(model), before)


def test_a_merge_under_another_is_not_undone_first(
    adapt: Build, refuses: Callable[..., None], logits: Logits
) -> None:
    """The second merge would be lost without a word."""
    model = adapt()
    before = logits(model)
    first = merge(model)
    inject(model, CONFIG, seed=1)
    refuses(
        model,
        lambda: unmerge(model, first),
        MergeError,
        "carries an adapter that came after the merge",
    )
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.fill_(0.1)
    second = merge(model)
    refuses(
        model,
        lambda: unmerge(model, first),
        MergeError,
        "q_proj.weight is no longer the merged weight",
    )
    unmerge(model, second)
    merge(
        model
    )  # the second adapter's parts are in the model again; taken in for good, they change what the first left
    refuses(model, lambda: unmerge(model, first), MergeError, "is no longer the merged weight")
    assert not torch.equal(logits(model), before)


def test_merges_are_undone_in_their_order(adapt: Build, logits: Logits) -> None:
    model = adapt()
    before, first = logits(model), merge(model)
    inject(model, CONFIG, seed=1)
    second = merge(model)
    unmerge(model, second)
    for name, layer in list(lora_layers(model)):
        replace_module(model, name, layer.base)
    unmerge(model, first)
    assert torch.equal(logits(model), before)


def test_a_model_that_was_cast_since_is_not_unmerged(adapt: Build) -> None:
    """The original bits would stand in another dtype than the rest."""
    model = adapt()
    merged = merge(model)
    model.to(torch.bfloat16)
    with pytest.raises(MergeError, match="moved, cast or merged into again"):
        unmerge(model, merged)


def test_training_goes_on_after_an_undone_merge(adapt: Build, tokens: Tensor) -> None:
    model = adapt()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unmerge(model, merge(model))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert {
        name for name, parameter in model.named_parameters() if parameter.grad is not None
    } == trained


@pytest.mark.parametrize("training", [True, False])
def test_modes_survive_both_ways(adapt: Build, training: bool) -> None:
    model = adapt().train(training)
    merged = merge(model)
    assert all(module.training is training for module in model.modules())
    model.train(not training)
    unmerge(model, merged)
    assert all(module.training is not training for module in model.modules())


def test_a_merged_model_takes_another_adapter(adapt: Build, logits: Logits) -> None:
    model = adapt()
    merge(model)
    before = logits(model)
    inject(model, CONFIG, seed=1)
    assert torch.equal(logits(model), before)


def test_nf4_is_refused(build_nf4_llama: Build, refuses: Callable[..., None]) -> None:
    model = build_nf4_llama()
    inject(model, CONFIG, seed=0)
    refuses(
        model, lambda: merge(model), MergeError, "model.layers.0.self_attn.q_proj is stored in nf4"
    )


def test_a_forced_merge_into_nf4_is_the_sum_rounded_with_the_same_settings(
    build_nf4_llama: Build, randomise: Callable[..., None]
) -> None:
    """The reference is bitsandbytes' own rounding of W0 + s·B·A; dtype and block size of the codes stay."""
    model = build_nf4_llama(torch.bfloat16)
    inject(model, CONFIG, seed=0)
    randomise(model)
    sums = {
        name: layer.frozen.dense(torch.float32) + layer.delta()
        for name, layer in lora_layers(model)
    }
    before = {name: layer.base.weight.quant_state for name, layer in lora_layers(model)}
    merged = merge(model, force=True)
    for name, total in sums.items():
        weight = model.get_submodule(name).weight
        codes, state = quantize_4bit(
            total, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(weight.data, codes)
        assert torch.equal(
            dequantize_4bit(weight.data, weight.quant_state).float(),
            dequantize_4bit(codes, state).bfloat16().float(),
        )
        found = weight.quant_state
        assert (found.blocksize, found.nested, found.dtype, found.shape) == (
            64,
            True,
            before[name].dtype,
            before[name].shape,
        )
        assert found is not before[name] and model.get_submodule(name).quant_state is found
    assert merged.kept.keys() == sums.keys()
    assert all(
        0.5 < each.fraction < 1.5 for each in merged.kept.values()
    )  # the noise is as large as the weight


def test_unmerge_restores_every_bit_of_an_nf4_base(
    build_nf4_llama: Build,
    randomise: Callable[..., None],
    logits: Logits,
    state_of: Callable[..., dict[str, Tensor]],
    assert_same_state: Callable[..., None],
) -> None:
    model = build_nf4_llama()
    inject(model, CONFIG, seed=0)
    randomise(model)
    before, state, digest = logits(model), state_of(model), fingerprint(model)
    merged = merge(model, force=True)
    assert fingerprint(model) != digest
    assert not torch.equal(logits(model), before)
    unmerge(model, merged)
    assert_same_state(state_of(model), state)
    assert fingerprint(model) == digest
    assert torch.equal(logits(model), before)


def test_a_forced_merge_into_a_dense_base_is_a_merge(
    adapt: Build, state_of: Callable[..., dict[str, Tensor]]
) -> None:
    one, other = adapt(), adapt()
    assert merge(one, force=True).kept == merge(other).kept == {}
    assert all(torch.equal(value, state_of(other)[name]) for name, value in state_of(one).items())


def test_a_forced_sum_that_is_not_finite_is_refused(
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


def test_a_model_without_an_adapter_is_refused(
    build_llama: Build, refuses: Callable[..., None]
) -> None:
    model = build_llama()
    refuses(model, lambda: merge(model), MergeError, "carries no adapter")


def test_a_sum_that_overflows_is_refused_and_nothing_is_merged(
    refuses: Callable[..., None],
) -> None:
    """The first layer could be merged, the second exceeds what float16 can hold, 65,504."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).half()
    inject(model, LoraConfig(r=1, lora_alpha=1), seed=0)
    with torch.no_grad():
        model[0].lora_B.fill_(1.0)
        model[1].lora_B.fill_(1e6)
    refuses(
        model,
        lambda: merge(model),
        MergeError,
        "1: the merged weight is not finite in torch.float16; merge in float32",
    )


def test_a_wrapped_model_merges(
    adapt: Build, logits: Logits, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    model = adapt()
    before = logits(model)
    merge(wrapper(model))
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 * before.abs().max().item())
