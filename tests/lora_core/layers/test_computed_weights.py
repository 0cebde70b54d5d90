"""Modules that compute a weight from other tensors are refused before anything changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

from lora_core import (
    Identity,
    LoraConfig,
    TargetError,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
HOOKED: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "weight norm": utils.weight_norm,
    "spectral norm": utils.spectral_norm,
}
"""Ways of `torch.nn.utils` to compute a weight in a hook before each call."""
PARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "parametrized weight norm": parametrizations.weight_norm,
    "parametrized spectral norm": parametrizations.spectral_norm,
}
WAYS = {**HOOKED, **PARAMETRIZED}
LAYERS = {"linear": nn.Linear, "table": nn.Embedding, "conv": nn.Conv2d}


def build() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {
        "plain": nn.Linear(8, 8),
        "linear": nn.Linear(8, 8),
        "table": nn.Embedding(10, 8),
        "conv": nn.Conv2d(3, 4, 3),
    }
    return nn.ModuleDict(layers)


def refuses(model: nn.Module, match: str, **settings: Any) -> None:
    """Check that an injection is refused and leaves the model as it is."""
    modules = dict(model.named_modules())
    settings = {"target_modules": ("plain",), **settings}
    with pytest.raises(TargetError, match=match):
        inject(model, LoraConfig(r=2, lora_alpha=2, **settings), seed=0)
    assert dict(model.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("layer", LAYERS)
def test_target_is_refused_with_the_reason(way: Callable[[nn.Module], object], layer: str) -> None:
    model = build()
    way(model[layer])
    match = "whose weight is computed from other tensors, as by pruning; make it permanent"
    refuses(model, match, target_modules=(layer,))
    refuses(model, match, target_modules=("plain", layer))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_rows_and_biases_are_refused(way: Callable[[nn.Module], object]) -> None:
    model = build()
    way(model["table"])
    refuses(model, "table, whose weight is computed", trainable_token_indices={"table": (1,)})
    way(model["linear"])
    refuses(model, "linear, whose weight is computed", bias="all")


@pytest.mark.parametrize("way", HOOKED.values(), ids=HOOKED.keys())
@pytest.mark.parametrize("layer", LAYERS)
def test_full_training_of_a_hooked_weight_is_refused(
    way: Callable[[nn.Module], object], layer: str
) -> None:
    model = build()
    way(model[layer])
    refuses(model, "weight is computed at every call", modules_to_save=(layer,))


def test_pruned_bias_of_a_target_is_refused() -> None:
    model = build()
    prune.l1_unstructured(model["linear"], "bias", 0.5)
    refuses(model, "linear, whose bias is computed", target_modules=("linear",))


def test_pruning_that_is_permanent_is_adapted() -> None:
    model = build()
    prune.l1_unstructured(model["linear"], "weight", 0.5)
    prune.remove(model["linear"], "weight")
    x = torch.randn(2, 8)
    before = model["linear"](x)
    inject(model, LoraConfig(r=2, lora_alpha=2, target_modules=("linear",)), seed=0)
    assert torch.equal(model["linear"](x), before)


@pytest.mark.parametrize("way", PARAMETRIZED.values(), ids=PARAMETRIZED.keys())
def test_full_training_of_a_parametrized_weight_is_saved_and_merged(
    way: Callable[[nn.Module], object], tmp_path: Path
) -> None:
    x = torch.randn(2, 8)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=("plain",), modules_to_save=("linear",))

    def parametrized() -> nn.ModuleDict:
        model = build()
        torch.manual_seed(1)
        way(model["linear"])
        return model.eval()

    def output(model: nn.ModuleDict) -> Tensor:
        result: Tensor = model["plain"](model["linear"](x)).detach()
        return result

    model = parametrized()
    inject(model, config, seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    trained = output(model)
    save_adapter(model, tmp_path, config, Identity())
    loaded = parametrized()
    base = output(loaded)
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(output(loaded), trained, rtol=0, atol=1e-6)
    merged = merge(loaded)
    torch.testing.assert_close(output(loaded), trained, rtol=0, atol=1e-5)
    unmerge(loaded, merged)
    torch.testing.assert_close(output(loaded), trained, rtol=0, atol=1e-6)
    assert (trained - base).abs().max() > 0.01
