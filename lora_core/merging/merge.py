"""Merge an adapter into its base and unmerge it again, bit for bit.

The sum W0 + s·B·A is formed in float32 and rounded once. Subtracting it again would not restore W0
(in bfloat16, 4 of 10 weights differ after one round), so the original bits are kept until the merge
is undone or accepted.

An adapter over one user of a shared weight, such as a tied output head, changes only what that user
computes. So does its merge: the merged module gets a separate weight, the other users keep theirs,
and the model's config is updated. Rows that embedding and head train together stay shared.

A 4-bit base is refused: its quantization levels are so far apart that a small update is rounded
away. `force=True` merges anyway and reports how much of each update survives.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora_core.base.nf4 import dequantized_weight, requantize
from lora_core.base.sharing import (
    FLAG,
    Slot,
    configs_to_untie,
    memory_of,
    models_of_tied_heads,
    slots,
)
from lora_core.errors import MergeError
from lora_core.layers.linear import LoraLinear
from lora_core.layers.trained import TiedEmbedding, TiedHead
from lora_core.merging.fidelity import Retention, measure_retention
from lora_core.modules import adapter_parts, replace_module


class Holder(NamedTuple):
    """A slot in the base and the parameter object that it holds before the merge."""

    slot: Slot
    parameter: nn.Parameter


@dataclass(frozen=True)
class Merged:
    """What a merge replaced: enough to undo it."""

    parts: dict[str, nn.Module]
    """Module path → the adapter's part at that path."""
    originals: dict[str, Tensor]
    """Parameter path → its value before the merge, bit for bit."""
    retention: dict[str, Retention] = field(default_factory=dict)
    """Module path → what survived of the update, for the layers that were rounded to 4 bits."""
    shared: dict[str, list[Holder]] = field(default_factory=dict)
    """Parameter path → the slots that share it and change together."""
    untied: list[Holder] = field(default_factory=list)
    """Other users of a changed weight, if more than one is left: they no longer share memory."""
    configs: tuple[Any, ...] = ()
    """The configs whose flag was set to "no weights are tied"."""
    stored: dict[str, Hashable] = field(default_factory=dict)
    """Parameter path → the memory of the merged weight."""


@torch.no_grad()
def merge(model: nn.Module, *, force: bool = False) -> Merged:
    """Add everything the adapter trained to the base; no trace of LoRA is left in the model.

    All sums are formed before the first is stored, and a later failure is undone, so on any error
    the model is unchanged.

    Args:
        model: has the adapter; changed in place. A merge into a shared weight unties it.
        force: merge into a 4-bit base too: the sum is quantized again with the base's settings.

    Returns:
        What `unmerge` needs. Drop it to accept the merge and free the originals.

    Raises:
        MergeError: there is no adapter, the base is quantized and `force` is not set, a sum does
            not fit the weight's dtype, or the model uses an adapted module at a second path, where
            it computes without the adapter.
    """
    parts = dict(adapter_parts(model))
    if not parts:
        raise MergeError("the model carries no adapter; inject or load one before merging")
    _refuse_reused_modules(model, parts)
    sums: dict[str, Tensor] = {}
    for name, part in parts.items():
        sums.update(_sums(name, part, force))
    retention = {}
    for name, part in parts.items():
        if _is_four_bit(part):
            retention[name] = _retention(part, sums[f"{name}.weight"])
    shared = {}
    originals = {}
    for path in sums:
        shared[path] = _holders(parts, path)
        originals[path] = _original(shared[path][0].parameter)
    tied = models_of_tied_heads(model)
    other_users = _other_users(model, shared)
    untied = _to_untie(other_users, shared) if tied else []
    merged = Merged(parts, originals, retention, shared, untied)
    try:
        _store_sums(model, merged, sums, separate=other_users.keys())
        merged = replace(merged, configs=configs_to_untie(tied))
        _set_flag(merged.configs, is_tied=False)
    except BaseException:
        _undo(model, merged)
        raise
    stored = {path: memory_of(holders[0].slot.parameter) for path, holders in shared.items()}
    return replace(merged, stored=stored)


@torch.no_grad()
def unmerge(model: nn.Module, merged: Merged) -> None:
    """Undo `merge`: restore the base's original bits, the adapter's parts and the ties.

    Raises:
        MergeError: a later change to the model would be lost or mixed in; the model is unchanged.
    """
    if any(True for _ in adapter_parts(model)):
        raise MergeError(
            "the model carries an adapter that came after the merge, or was never merged; "
            "take that out first"
        )
    for path, memory in merged.stored.items():
        if memory_of(merged.shared[path][0].slot.parameter) != memory:
            raise MergeError(
                f"{path} is no longer the merged weight: "
                "the model was moved, cast or merged into again; undo that first, "
                "or load the base and the adapter again"
            )
    _undo(model, merged)


def _undo(model: nn.Module, merged: Merged) -> None:
    """Restore the state before the merge, also after a partial merge."""
    for path, original in merged.originals.items():
        for slot, parameter in merged.shared[path]:
            _store(slot, parameter, original)
    for slot, parameter in merged.untied:
        _store(slot, parameter, parameter)
    for name, part in merged.parts.items():
        replace_module(model, name, part)
    _set_flag(merged.configs, is_tied=True)


def _sums(name: str, part: nn.Module, force: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the path and the new value of each parameter of the base that changes."""
    for key, value in _dense_tensors(name, part).items():
        dtype = _base(part).get_parameter(key).dtype
        total = value.detach().to(dtype, copy=isinstance(value, nn.Parameter))
        yield f"{name}.{key}", _checked_finite(name, total)
    if _is_four_bit(part):
        yield f"{name}.weight", _requantized(name, cast(LoraLinear, part), force)


def _dense_tensors(name: str, part: nn.Module) -> dict[str, Tensor]:
    """Return the new values of the base's parameters, except 4-bit codes."""
    if isinstance(part, LoraLinear) and part.frozen.kind == "int8":
        raise MergeError(
            f"{name} is stored in int8, which has no merge without losses; "
            "load the base in full precision and merge there"
        )
    if _is_four_bit(part):
        bias = cast(LoraLinear, part).merged_bias()
        return {} if bias is None else {"bias": bias}
    merged: dict[str, Tensor] = part.merged_tensors()  # type: ignore[operator]
    return merged


def _requantized(name: str, layer: LoraLinear, force: bool) -> Tensor:
    """Return the merged weight of a 4-bit layer, quantized again."""
    if not force:
        raise MergeError(
            f"{name} is stored in {layer.frozen.kind}: "
            "rounding to 4 bits would erase most of a small update; "
            "load the base in full precision and merge there, "
            "or pass force=True and look at what was kept"
        )
    total = layer.frozen.dense(torch.float32) + layer.delta()
    codes: Tensor = requantize(layer.frozen.stored, _checked_finite(name, total))
    return codes


def _checked_finite(name: str, total: Tensor) -> Tensor:
    if not torch.isfinite(total).all():
        raise MergeError(
            f"{name}: the merged weight is not finite in {total.dtype}; merge in float32"
        )
    return total


def _retention(part: nn.Module, codes: Tensor) -> Retention:
    layer = cast(LoraLinear, part)
    base = layer.frozen.dense(torch.float32)
    return measure_retention(layer.delta(), base=base, merged=dequantized_weight(codes))


def _is_four_bit(part: nn.Module) -> bool:
    return isinstance(part, LoraLinear) and part.frozen.kind in ("nf4", "fp4")


def _base(part: nn.Module) -> nn.Module:
    base: nn.Module = part.base  # type: ignore[assignment]
    return base


def _holders(parts: Mapping[str, nn.Module], path: str) -> list[Holder]:
    """Return the slots of the parameter at `path` in the base under its part.

    They include the head and the embeddings that use what another embedding trains.
    """
    longest_first = sorted(parts, key=len, reverse=True)
    name = next(name for name in longest_first if path.startswith(f"{name}."))
    base = _base(parts[name])
    parameter = base.get_parameter(path.removeprefix(f"{name}."))
    holders = [Holder(slot, parameter) for slot in slots(base) if slot.parameter is parameter]
    for part in parts.values():
        if isinstance(part, TiedHead | TiedEmbedding) and part.embedding is parts[name]:
            slot = Slot(_base(part), "weight")
            holders.append(Holder(slot, slot.parameter))
    return holders


def _original(stored: Any) -> Tensor:
    """Return the stored weight's bits; a 4-bit weight keeps its quantization state."""
    original: Tensor = copy(stored) if hasattr(stored, "quant_state") else stored.data
    return original


def _refuse_reused_modules(model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Refuse a model that uses a module of an adapted base outside the adapter as well.

    It would get the merged weight there too.
    """
    everywhere = _count_uses(model)
    for name, part in parts.items():
        inside = _count_uses(_base(part)) + Counter([id(_base(part))])
        if any(everywhere[module] > inside[module] for module in inside):
            raise MergeError(
                f"{name} is in the model at another path too, which the adapter leaves alone; "
                "give that path its own copy"
            )


def _count_uses(module: nn.Module) -> Counter[int]:
    """Count the places under `module` that refer to each module, by id."""
    uses: Counter[int] = Counter()
    for parent in module.modules():
        for child in parent._modules.values():
            if child is not None:
                uses[id(child)] += 1
    return uses


def _other_users(model: nn.Module, shared: Mapping[str, list[Holder]]) -> dict[str, list[Slot]]:
    """Return, by path, the other slots with a weight that changes; paths without any are absent."""
    users: dict[Hashable, list[Slot]] = defaultdict(list)
    for slot in slots(model):
        users[memory_of(slot.parameter)].append(slot)
    others = {}
    for path, holders in shared.items():
        own = [holder.slot for holder in holders]
        found = [slot for slot in users[memory_of(own[0].parameter)] if slot not in own]
        if found:
            others[path] = found
    return others


def _to_untie(
    other_users: Mapping[str, list[Slot]], shared: Mapping[str, list[Holder]]
) -> list[Holder]:
    """Return the users that must leave a tie of more than two when one has left.

    Otherwise a saved file would use the tensor of the changed one for some of the rest.
    """
    changed = [holder.slot for holders in shared.values() for holder in holders]
    left: dict[Slot, nn.Parameter] = {}
    for found in other_users.values():
        if len(found) > 1:
            left |= {slot: slot.parameter for slot in found if slot not in changed}
    return [Holder(slot, parameter) for slot, parameter in left.items()]


def _store_sums(
    model: nn.Module, merged: Merged, sums: Mapping[str, Tensor], separate: Collection[str]
) -> None:
    """Store the sums and put the base's modules back.

    The paths in `separate` get a separate parameter: other users keep the shared one.
    """
    for path, holders in merged.shared.items():
        for slot, parameter in holders:
            if path not in separate:
                _store(slot, parameter, sums[path])
            elif len(holders) == 1:
                _store(slot, copy(parameter), sums[path])
            else:
                _store(slot, copy(parameter), sums[path].clone())
    for slot, parameter in merged.untied:
        _store(slot, copy(parameter), parameter.clone())
    for name, part in merged.parts.items():
        replace_module(model, name, _base(part))


def _store(slot: Slot, parameter: Any, weight: Any) -> None:
    """Set the value of `parameter` to `weight` and put it in its slot."""
    parameter.data = weight.data
    setattr(slot.owner, slot.name, parameter)
    if hasattr(parameter, "quant_state"):
        parameter.quant_state = slot.owner.quant_state = weight.quant_state


def _set_flag(configs: tuple[Any, ...], *, is_tied: bool) -> None:
    for config in configs:
        if getattr(config, FLAG) is not is_tied:
            setattr(config, FLAG, is_tied)
