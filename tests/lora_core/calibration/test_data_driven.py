"""Given factors initialize all layers or none; data-driven methods require their input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    Bank,
    ConfigError,
    LoraConfig,
    TargetError,
    inject,
    lora_layers,
    set_initialization,
)

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
# Sums of at most 128 float32 products, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config(init: str = "kaiming", **fields: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=6, target_modules=(Q, DOWN), init_lora_weights=init, **fields)


def random_pairs(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B, both nonzero, for every layer of an adapted model."""
    generator = torch.Generator().manual_seed(2)
    pairs = {}
    for name, layer in lora_layers(model):
        a = 0.1 * torch.randn(layer.lora_A.shape, generator=generator)
        b = 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
        pairs[name] = (a, b)
    return pairs


# --- set_initialization ---


def test_given_a_is_used_and_step_0_equals_base(build_llama: Build, logits: Logits) -> None:
    model = build_llama()
    before = logits(model)
    inject(model, config(), seed=1)
    given = {name: a for name, (a, _) in random_pairs(model).items()}
    set_initialization(model, given)
    for name, layer in lora_layers(model):
        assert torch.equal(layer.lora_A, given[name])
        assert not layer.lora_B.any()
        assert layer.lora_A.requires_grad
        assert layer.lora_B.requires_grad
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_given_pair_adds_its_product_to_the_weight(
    build_llama: Build, logits: Logits, use_dora: bool
) -> None:
    """Also under DoRA: the rows keep the norms of W0 + s·B·A, so the layer computes this sum."""
    model = build_llama()
    dense = build_llama()
    inject(model, config(use_dora=use_dora), seed=1)
    set_initialization(model, random_pairs(model))
    for name, (a, b) in random_pairs(model).items():
        dense.get_submodule(name).weight.data += 1.5 * b @ a
    torch.testing.assert_close(logits(model), logits(dense), **CLOSE)
    assert (logits(model) - logits(build_llama())).abs().max() > 0.01


def test_wrapper_does_not_change_names(
    build_llama: Build, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    model = build_llama()
    inject(model, config(), seed=1)
    pairs = random_pairs(model)
    set_initialization(wrapper(model), pairs)
    _, b = pairs[Q]
    assert torch.equal(dict(lora_layers(model))[Q].lora_B, b)


def wrong_shape(given: dict[str, Any]) -> None:
    a, b = given[DOWN]
    given[DOWN] = (a, b.T)


def wrong_rank(given: dict[str, Any]) -> None:
    given[DOWN] = torch.zeros(5, 128)


def not_finite(given: dict[str, Any]) -> None:
    _, b = given[DOWN]
    b[3, 2] = torch.inf


def integers(given: dict[str, Any]) -> None:
    given[DOWN] = torch.ones(4, 128, dtype=torch.int64)


def extra_name(given: dict[str, Any]) -> None:
    given["model.layers.1.mlp.up_proj"] = torch.zeros(4, 64)


def missing_name(given: dict[str, Any]) -> None:
    del given[DOWN]


@pytest.mark.parametrize(
    ("corrupt", "error", "message"),
    [
        (
            wrong_shape,
            ConfigError,
            rf"the B given for {DOWN} is \(4, 64\) and its layer has \(64, 4\)",
        ),
        (wrong_rank, ConfigError, r"the A given for .* is \(5, 128\)"),
        (not_finite, ConfigError, f"the B given for {DOWN} .* not finite floats"),
        (integers, ConfigError, "torch.int64"),
        (
            extra_name,
            TargetError,
            "1 names have no adapted linear layer, such as 'model.layers.1.mlp.up_proj'",
        ),
        (missing_name, TargetError, f"1 adapted layers have no factors, such as {DOWN}"),
    ],
)
def test_invalid_factors_raise_and_change_nothing(
    build_llama: Build,
    refuses: Callable[..., None],
    corrupt: Callable[[dict[str, Any]], None],
    error: type[Exception],
    message: str,
) -> None:
    """The factors of the first layer are valid in each case, and are not written either."""
    model = build_llama()
    inject(model, config(), seed=1)
    given: dict[str, Any] = random_pairs(model)
    corrupt(given)
    refuses(model, lambda: set_initialization(model, given), error, message)


def test_model_without_adapter_raises(build_llama: Build) -> None:
    with pytest.raises(TargetError, match="the model has no adapted linear layer"):
        set_initialization(build_llama(), {Q: torch.zeros(4, 64)})


def test_spectral_initialization_is_not_overwritten(
    build_llama: Build, refuses: Callable[..., None]
) -> None:
    """The layer subtracts its initial pair, which must be the pair that was set."""
    model = build_llama()
    inject(model, config("olora"), seed=1)
    pairs = random_pairs(model)
    message = f"{Q} is initialized from its weight"
    refuses(model, lambda: set_initialization(model, pairs), TargetError, message)


# --- required and ineffective arguments ---


@pytest.mark.parametrize(
    ("init", "given", "message"),
    [
        ("eva", {}, "'eva' needs 'data', and none is given; pass data= to `inject`"),
        ("loftq", {}, "'loftq' needs 'original', and none is given"),
        ("eva", {"original": {}}, "'eva' needs 'data'"),
        (
            "kaiming",
            {"data": []},
            "'data' has no effect on init_lora_weights='kaiming'; leave it out, or use 'eva'",
        ),
        (
            "pissa",
            {"original": {}},
            "'original' has no effect on init_lora_weights='pissa'; leave it out, or use 'loftq'",
        ),
    ],
)
def test_missing_or_ineffective_input_raises(
    build_llama: Build, refuses: Callable[..., None], init: str, given: dict[str, Any], message: str
) -> None:
    model = build_llama()
    refuses(model, lambda: inject(model, config(init), seed=0, **given), ConfigError, message)


def test_bank_does_not_support_data_driven_initialization(build_llama: Build) -> None:
    bank = Bank(build_llama())
    with pytest.raises(ConfigError, match="use `set_initialization`"):
        bank.add("one", config("eva"), seed=0)
    assert bank.names == []
