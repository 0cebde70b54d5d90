"""Merge an adapter into its base and take it out again, to the last bit.

The sum W0 + s·B·A is formed in float32 and rounded once. Subtracting it again would not restore W0 (in bfloat16, 4 of
10 weights differ after one round), so the original bits are kept until the merge is undone or accepted.

A 4-bit base is refused: its codes lie so far apart that a small update is rounded back to where it came from. Who
wants it nevertheless forces it, and gets the figures of what survived.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.base.nf4 import dequantised, requantised
from lora_core.errors import MergeError
from lora_core.layers.linear import LoraLinear
from lora_core.layers.trained import TiedHead, TrainedRows
from lora_core.merging.fidelity import Kept, kept
from lora_core.modules import adapter_parts, replace_module


@dataclass(frozen=True)
class Merged:
    """What a merge replaced: enough to undo it."""

    parts: dict[str, nn.Module]
    """Module path → the adapter's part that stood there."""
    originals: dict[str, Tensor]
    """Parameter's path → what it held before the merge, bit for bit."""
    kept: dict[str, Kept] = field(default_factory=dict)
    """Module path → what survived of the update, for the layers that were rounded to 4 bits."""


@torch.no_grad()
def merge(model: nn.Module, *, force: bool = False) -> Merged:
    """Put everything the adapter trained into the base; the model is left without a trace of LoRA.

    All sums are formed before the first is stored, so a failure leaves the model as it was.

    Args:
        model: carries the adapter; changed in place.
        force: merge into a 4-bit base too: the sum is rounded again with the base's own settings.

    Returns:
        What `unmerge` needs. Drop it to accept the merge and free the originals.

    Raises:
        MergeError: no adapter, a quantised base without `force`, or a sum that the weight's dtype cannot hold.
    """
    parts = dict(adapter_parts(model))
    if not parts:
        raise MergeError("the model carries no adapter; inject or load one before merging")
    _refuse_shared_weights(model, parts)
    sums = {path: total for name, part in parts.items() for path, total in _sums(name, part, force)}
    rounded = {name: _kept(part, sums[f"{name}.weight"]) for name, part in parts.items() if _is_four_bit(part)}
    originals = {path: _original(_parameter(parts, path)) for path in sums}
    for path, total in sums.items():
        _store(parts, path, total)
    for name, part in parts.items():
        replace_module(model, name, _base(part))
    return Merged(parts, originals, rounded)


@torch.no_grad()
def unmerge(model: nn.Module, merged: Merged) -> None:
    """Undo `merge`: the base weights get their original bits back and the adapter's parts their places."""
    for path, original in merged.originals.items():
        _store(merged.parts, path, original)
    for name, part in merged.parts.items():
        replace_module(model, name, part)


def _sums(name: str, part: nn.Module, force: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the path of each parameter of the base that changes, and what it becomes."""
    if _is_four_bit(part):
        yield f"{name}.weight", _rounded(name, cast(LoraLinear, part), force)
        return
    if isinstance(part, LoraLinear) and part.frozen.kind == "int8":
        raise MergeError(f"{name} is stored in int8, which has no merge without losses; load the base in full precision and merge there")
    merged: dict[str, Tensor] = part.merged_tensors()  # type: ignore[operator]
    for own, value in merged.items():
        dtype = _parameter({name: part}, f"{name}.{own}").dtype
        yield f"{name}.{own}", _finite(name, value.detach().to(dtype))


def _rounded(name: str, layer: LoraLinear, force: bool) -> Tensor:
    """Return the merged weight of a 4-bit layer in codes anew."""
    if not force:
        raise MergeError(
            f"{name} is stored in {layer.frozen.kind}: rounding to 4 bits would erase most of a small update; "
            "load the base in full precision and merge there, or pass force=True and look at what was kept"
        )
    if not layer.is_plain and layer.magnitude is None:
        raise MergeError(f"{name} trains a bias, which is not merged into 4 bits; load the base in full precision and merge there")
    rounded: Tensor = requantised(layer.frozen.stored, _finite(name, layer.frozen.dense(torch.float32) + layer.delta()))
    return rounded


def _finite(name: str, total: Tensor) -> Tensor:
    if not torch.isfinite(total).all():
        raise MergeError(f"{name}: the merged weight is not finite in {total.dtype}; merge in float32")
    return total


def _kept(part: nn.Module, total: Tensor) -> Kept:
    layer = cast(LoraLinear, part)
    return kept(layer.delta(), base=layer.frozen.dense(torch.float32), merged=dequantised(total))


def _is_four_bit(part: nn.Module) -> bool:
    return isinstance(part, LoraLinear) and part.frozen.kind in ("nf4", "fp4")


def _base(part: nn.Module) -> nn.Module:
    base: nn.Module = part.base  # type: ignore[assignment]
    return base


def _parameter(parts: Mapping[str, nn.Module], path: str) -> Any:
    """Return the base's parameter at `path`, which lies in the base under one of the parts."""
    name = next(name for name in sorted(parts, key=len, reverse=True) if path.startswith(f"{name}."))
    return _base(parts[name]).get_parameter(path.removeprefix(f"{name}."))


def _original(stored: Any) -> Tensor:
    """Return the stored weight's own bits; of a 4-bit weight also what decodes them, which rides on the tensor."""
    original: Tensor = copy(stored) if hasattr(stored, "quant_state") else stored.data
    return original


def _store(parts: Mapping[str, nn.Module], path: str, weight: Any) -> None:
    stored = _parameter(parts, path)
    stored.data = weight.data
    if hasattr(stored, "quant_state"):
        layer: Any = _base(parts[path.rpartition(".")[0]])
        stored.quant_state = layer.quant_state = weight.quant_state


def _refuse_shared_weights(model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """A tied head merged into would change the embedding as well; rows that both have trained are the exception."""
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, part in parts.items():
        if isinstance(part, TrainedRows | TiedHead):
            continue
        if any(users[id(parameter)] > 1 for parameter in _base(part).parameters()):
            raise MergeError(f"{name} shares its weight with another module; untie the two, or leave it out of the adapter")
