"""Merge an adapter into its base and take it out again, to the last bit.

The sum W0 + s·B·A is formed in float32 and rounded once. Subtracting it again would not restore W0 (in bfloat16, 4 of
10 weights differ after one round), so the original bits are kept until the merge is undone or accepted.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core.errors import MergeError
from lora_core.injection import lora_layers, replace_module
from lora_core.layers import LoraLinear


@dataclass(frozen=True)
class Merged:
    """What a merge replaced: enough to undo it."""

    layers: dict[str, LoraLinear]
    originals: dict[str, Tensor]
    """Module path → the base weight before the merge, bit for bit."""


@torch.no_grad()
def merge(model: nn.Module) -> Merged:
    """Put every adapter's update into its base weight; the model is left without a trace of LoRA.

    All sums are formed before the first is stored, so a failure leaves the model as it was.

    Returns:
        What `unmerge` needs. Drop it to accept the merge and free the originals.

    Raises:
        MergeError: no adapter, a 4-bit base, or a sum that the weight's dtype cannot hold.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise MergeError("the model carries no adapter; inject or load one before merging")
    _refuse_shared_weights(model, layers)
    sums = {name: _sum(name, layer) for name, layer in layers.items()}
    originals = {name: layer.frozen.stored.data for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.frozen.stored.data = sums[name]
        replace_module(model, name, layer.base)
    return Merged(layers, originals)


@torch.no_grad()
def unmerge(model: nn.Module, merged: Merged) -> None:
    """Undo `merge`: the base weights get their original bits back and the adapters their places."""
    for name, layer in merged.layers.items():
        layer.frozen.stored.data = merged.originals[name]
        replace_module(model, name, layer)


def _sum(name: str, layer: LoraLinear) -> Tensor:
    if layer.frozen.kind != "dense":
        raise MergeError(
            f"{name} is stored in {layer.frozen.kind}: rounding to 4 bits would erase most of a small update; "
            "load the base in full precision and merge there"
        )
    weight = layer.frozen.stored
    total = (weight.float() + layer.delta()).to(weight.dtype)
    if not torch.isfinite(total).all():
        raise MergeError(f"{name}: the merged weight is not finite in {weight.dtype}; merge in float32")
    return total


def _refuse_shared_weights(model: nn.Module, layers: dict[str, LoraLinear]) -> None:
    """A tied head merged into would change the embedding as well."""
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, layer in layers.items():
        if users[id(layer.frozen.stored)] > 1:
            raise MergeError(f"{name} shares its weight with another module; untie the two, or leave it out of target_modules")
