"""A merge preserves the logits, unmerge restores every bit, and a refused merge changes nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import LoraConfig, LoraLinear, MergeError, inject, lora_layers, merge, unmerge
from lora_core.modules import replace_module

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
CONFIG = LoraConfig(r=4, lora_alpha=8)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
def test_merge_preserves_the_logits(
    adapt: Build, build_llama: Build, logits: Logits, dtype: torch.dtype, tolerance: float
) -> None:
    """About 20 consecutive roundings of 6e-8 or 4e-3 each, relative to the largest logit.

    The update itself changes the logits far more.
    """
    model = adapt(dtype=dtype)
    before = logits(model).float()
    size = before.abs().max().item()
    merge(model)
    torch.testing.assert_close(logits(model).float(), before, rtol=0, atol=tolerance * size)
    assert (logits(build_llama(dtype=dtype)).float() - before).abs().max() > 0.3 * size


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 24), (torch.bfloat16, 8)], ids=str)
def test_merged_weight_is_the_exact_sum_rounded_once(
    adapt: Build, dtype: torch.dtype, digits: int
) -> None:
    model = adapt(dtype=dtype)
    exact = {}
    for name, layer in lora_layers(model):
        delta = 2.0 * (layer.lora_B.double() @ layer.lora_A.double())
        exact[name] = layer.base.weight.double() + delta
    merge(model)
    for name, expected in exact.items():
        found = model.get_submodule(name).weight
        assert found.dtype == dtype
        # Half a unit in the last place, plus the float32 rounding of terms that cancel.
        torch.testing.assert_close(found.double(), expected, rtol=2.0**-digits, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_model_is_plain(adapt: Build, build_llama: Build, tied: bool) -> None:
    model = adapt(tied=tied, dtype=torch.bfloat16)
    plain = build_llama(tied=tied, dtype=torch.bfloat16)
    merge(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    found = [(name, type(module)) for name, module in model.named_modules()]
    assert found == [(name, type(module)) for name, module in plain.named_modules()]
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
    before = logits(model)
    state = state_of(model)
    layers = dict(lora_layers(model))
    first = next(iter(layers))
    merged = merge(model)
    assert not torch.equal(merged.parts[first].base.weight, merged.originals[f"{first}.weight"])
    unmerge(model, merged)
    assert_same_state(state_of(model), state)
    assert dict(lora_layers(model)) == layers
    assert torch.equal(logits(model), before)


def test_repeated_merges_do_not_drift(
    adapt: Build, state_of: Callable[..., dict[str, Tensor]], assert_same_state: Callable[..., None]
) -> None:
    model = adapt(dtype=torch.bfloat16)
    before = state_of(model)
    for _ in range(5):
        unmerge(model, merge(model))
    assert_same_state(state_of(model), before)


def test_first_of_two_merges_cannot_be_undone_first(
    adapt: Build, refuses: Callable[..., None], logits: Logits
) -> None:
    """The second merge would be lost silently."""
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
    # The second adapter's parts are back in the model; merging them changes the merged weights.
    merge(model)
    refuses(model, lambda: unmerge(model, first), MergeError, "is no longer the merged weight")
    assert not torch.equal(logits(model), before)


def test_merges_are_undone_in_reverse_order(adapt: Build, logits: Logits) -> None:
    model = adapt()
    before = logits(model)
    first = merge(model)
    inject(model, CONFIG, seed=1)
    second = merge(model)
    unmerge(model, second)
    for name, layer in list(lora_layers(model)):
        replace_module(model, name, layer.base)
    unmerge(model, first)
    assert torch.equal(logits(model), before)


def test_model_cast_after_the_merge_cannot_be_unmerged(adapt: Build) -> None:
    """The original bits would have another dtype than the rest."""
    model = adapt()
    merged = merge(model)
    model.to(torch.bfloat16)
    with pytest.raises(MergeError, match="moved, cast or merged into again"):
        unmerge(model, merged)


def test_training_continues_after_unmerge(adapt: Build, tokens: Tensor) -> None:
    model = adapt()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unmerge(model, merge(model))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    with_gradient = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert with_gradient == trained


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_survives_merge_and_unmerge(adapt: Build, training: bool) -> None:
    model = adapt().train(training)
    merged = merge(model)
    assert all(module.training is training for module in model.modules())
    model.train(not training)
    unmerge(model, merged)
    assert all(module.training is not training for module in model.modules())


def test_merged_model_can_be_adapted_again(adapt: Build, logits: Logits) -> None:
    model = adapt()
    merge(model)
    before = logits(model)
    inject(model, CONFIG, seed=1)
    assert torch.equal(logits(model), before)


def test_model_without_an_adapter_is_refused(
    build_llama: Build, refuses: Callable[..., None]
) -> None:
    model = build_llama()
    refuses(model, lambda: merge(model), MergeError, "carries no adapter")


def test_sum_that_overflows_is_refused_and_nothing_is_merged(
    refuses: Callable[..., None],
) -> None:
    """The first layer could be merged; the second exceeds the float16 maximum, 65,504."""
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


def test_wrapped_model_can_be_merged(
    adapt: Build, logits: Logits, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    model = adapt()
    before = logits(model)
    merge(wrapper(model))
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 * before.abs().max().item())
