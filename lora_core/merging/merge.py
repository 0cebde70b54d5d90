"""Merge an adapter into its base and take it out again, to the last bit.

The sum W0 + s·B·A is formed in float32 and rounded once. Subtracting it again would not restore W0 (in bfloat16, 4 of
10 weights differ after one round), so the original bits are kept until the merge is undone or accepted.

An adapter over one user of a shared weight, such as the head that is the embedding, changes what that user computes and
nothing else. So does its merge: the merged module gets a weight of its own, the others keep theirs, and the model's config
is told. Rows that embedding and head train together stay shared.

A 4-bit base is refused: its codes lie so far apart that a small update is rounded back to where it came from. Who
wants it nevertheless forces it, and gets the figures of what survived.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.base.nf4 import dequantised, requantised
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
from lora_core.layers.trained import TiedHead
from lora_core.merging.fidelity import Retention, kept
from lora_core.modules import adapter_parts, replace_module

Held = list[tuple[Slot, nn.Parameter]]
"""Places in the base that change as one, and the parameters that stand there."""


@dataclass(frozen=True)
class Merged:
    """What a merge replaced: enough to undo it."""

    parts: dict[str, nn.Module]
    """Module path → the adapter's part that stood there."""
    originals: dict[str, Tensor]
    """Parameter's path → what it held before the merge, bit for bit."""
    kept: dict[str, Retention] = field(default_factory=dict)
    """Module path → what survived of the update, for the layers that were rounded to 4 bits."""
    held: dict[str, Held] = field(default_factory=dict)
    """Parameter's path → where it stood, and the very object, which others may hold as well."""
    others: Held = field(default_factory=list)
    """Where else a weight stood of whose sharers more than one was left."""
    configs: tuple[Any, ...] = ()
    """The configs that were told that no weight is tied any more."""
    stored: dict[str, Hashable] = field(default_factory=dict)
    """Parameter's path → the memory of the merged weight."""


@torch.no_grad()
def merge(model: nn.Module, *, force: bool = False) -> Merged:
    """Put everything the adapter trained into the base; the model is left without a trace of LoRA.

    All sums are formed before the first is stored, and what fails after that is undone: the model is as it was.

    Args:
        model: carries the adapter; changed in place. A merge into a weight that others share unties it.
        force: merge into a 4-bit base too: the sum is rounded again with the base's own settings.

    Returns:
        What `unmerge` needs. Drop it to accept the merge and free the originals.

    Raises:
        MergeError: no adapter, a quantised base without `force`, a sum that the weight's dtype cannot hold, or a module
            that stands in the model a second time, where it computes without the adapter.
    """
    parts = dict(adapter_parts(model))
    if not parts:
        raise MergeError("the model carries no adapter; inject or load one before merging")
    _refuse_other_places(model, parts)
    sums = {path: total for name, part in parts.items() for path, total in _sums(name, part, force)}
    rounded = {
        name: _kept(part, sums[f"{name}.weight"])
        for name, part in parts.items()
        if _is_four_bit(part)
    }
    held, tied = {path: _held(parts, path) for path in sums}, models_of_tied_heads(model)
    shared = _shared(model, held)
    originals = {path: _original(own[0][1]) for path, own in held.items()}
    merged = Merged(parts, originals, rounded, held, _to_part(shared, held) if tied else [])
    try:
        _put_in(model, merged, sums, apart=shared.keys())
        merged = replace(merged, configs=configs_to_untie(tied))
        _say_tied(merged.configs, False)
    except BaseException:
        _undo(model, merged)
        raise
    return replace(
        merged, stored={path: memory_of(own[0][0].parameter) for path, own in held.items()}
    )


@torch.no_grad()
def unmerge(model: nn.Module, merged: Merged) -> None:
    """Undo `merge`: the base weights get their original bits back, the adapter's parts their places, and ties are tied.

    Raises:
        MergeError: what was done to the model since would be lost or mixed in; it is unchanged.
    """
    if any(True for _ in adapter_parts(model)):
        raise MergeError(
            "the model carries an adapter that came after the merge, or was never merged; take that out first"
        )
    for path, memory in merged.stored.items():
        if memory_of(merged.held[path][0][0].parameter) != memory:
            raise MergeError(
                f"{path} is no longer the merged weight: the model was moved, cast or merged into again; undo that first, "
                "or load the base and the adapter anew"
            )
    _undo(model, merged)


def _undo(model: nn.Module, merged: Merged) -> None:
    """Put back what stood before the merge, also from half-way."""
    for path, original in merged.originals.items():
        for slot, parameter in merged.held[path]:
            _store(slot, parameter, original)
    for slot, parameter in merged.others:
        _store(slot, parameter, parameter)
    for name, part in merged.parts.items():
        replace_module(model, name, part)
    _say_tied(merged.configs, True)


def _sums(name: str, part: nn.Module, force: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the path of each parameter of the base that changes, and what it becomes."""
    for own, value in _dense_tensors(name, part).items():
        dtype = _base(part).get_parameter(own).dtype
        yield (
            f"{name}.{own}",
            _finite(name, value.detach().to(dtype, copy=isinstance(value, nn.Parameter))),
        )
    if _is_four_bit(part):
        yield f"{name}.weight", _rounded(name, cast(LoraLinear, part), force)


def _dense_tensors(name: str, part: nn.Module) -> dict[str, Tensor]:
    """Return what becomes of the base's parameters but of codes."""
    if isinstance(part, LoraLinear) and part.frozen.kind == "int8":
        raise MergeError(
            f"{name} is stored in int8, which has no merge without losses; load the base in full precision and merge there"
        )
    if _is_four_bit(part):
        bias = cast(LoraLinear, part).merged_bias()
        return {} if bias is None else {"bias": bias}
    merged: dict[str, Tensor] = part.merged_tensors()  # type: ignore[operator]
    return merged


def _rounded(name: str, layer: LoraLinear, force: bool) -> Tensor:
    """Return the merged weight of a 4-bit layer in codes anew."""
    if not force:
        raise MergeError(
            f"{name} is stored in {layer.frozen.kind}: rounding to 4 bits would erase most of a small update; "
            "load the base in full precision and merge there, or pass force=True and look at what was kept"
        )
    rounded: Tensor = requantised(
        layer.frozen.stored, _finite(name, layer.frozen.dense(torch.float32) + layer.delta())
    )
    return rounded


def _finite(name: str, total: Tensor) -> Tensor:
    if not torch.isfinite(total).all():
        raise MergeError(
            f"{name}: the merged weight is not finite in {total.dtype}; merge in float32"
        )
    return total


def _kept(part: nn.Module, total: Tensor) -> Retention:
    layer = cast(LoraLinear, part)
    return kept(layer.delta(), base=layer.frozen.dense(torch.float32), merged=dequantised(total))


def _is_four_bit(part: nn.Module) -> bool:
    return isinstance(part, LoraLinear) and part.frozen.kind in ("nf4", "fp4")


def _base(part: nn.Module) -> nn.Module:
    base: nn.Module = part.base  # type: ignore[assignment]
    return base


def _held(parts: Mapping[str, nn.Module], path: str) -> Held:
    """Return where the parameter at `path` stands in the base under its part; a head that follows trained rows is among it."""
    name = next(
        name for name in sorted(parts, key=len, reverse=True) if path.startswith(f"{name}.")
    )
    parameter = _base(parts[name]).get_parameter(path.removeprefix(f"{name}."))
    own = [slot for slot in slots(_base(parts[name])) if slot.parameter is parameter]
    following = [
        Slot(_base(part), "weight")
        for part in parts.values()
        if isinstance(part, TiedHead) and part.embedding is parts[name]
    ]
    return [(slot, slot.parameter) for slot in (*own, *following)]


def _original(stored: Any) -> Tensor:
    """Return the stored weight's own bits; of a 4-bit weight also what decodes them, which rides on the tensor."""
    original: Tensor = copy(stored) if hasattr(stored, "quant_state") else stored.data
    return original


def _refuse_other_places(model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Refuse a base of which a module stands past the adapter as well: there too it would get the merged weight."""
    everywhere = _standing(model)
    for name, part in parts.items():
        inside = _standing(_base(part)) + Counter([id(_base(part))])
        if any(everywhere[module] > inside[module] for module in inside):
            raise MergeError(
                f"{name} stands in the model at another place too, which the adapter leaves alone; give that a copy of its own"
            )


def _standing(module: nn.Module) -> Counter[int]:
    """Count at how many places under `module` each module stands."""
    return Counter(
        id(child)
        for parent in module.modules()
        for child in parent._modules.values()
        if child is not None
    )


def _shared(model: nn.Module, held: Mapping[str, Held]) -> dict[str, list[Slot]]:
    """Return, by path, who else has a weight that changes."""
    users: dict[Hashable, list[Slot]] = defaultdict(list)
    for slot in slots(model):
        users[memory_of(slot.parameter)].append(slot)
    own = {path: [slot for slot, _ in places] for path, places in held.items()}
    shared = {
        path: [slot for slot in users[memory_of(places[0].parameter)] if slot not in places]
        for path, places in own.items()
    }
    return {path: found for path, found in shared.items() if found}


def _to_part(shared: Mapping[str, list[Slot]], held: Mapping[str, Held]) -> Held:
    """Return who has to leave a tie of more than two when one has left: a file would take some of the rest for the one that changed."""
    changed = [slot for places in held.values() for slot, _ in places]
    left = {
        slot: slot.parameter
        for found in shared.values()
        if len(found) > 1
        for slot in found
        if slot not in changed
    }
    return list(left.items())


def _put_in(
    model: nn.Module, merged: Merged, sums: Mapping[str, Tensor], apart: Collection[str]
) -> None:
    """Store the sums and put the base's modules back; a weight that others have too is left to them."""
    for path, held in merged.held.items():
        for slot, parameter in held:
            if path in apart:
                _store(slot, copy(parameter), sums[path].clone() if len(held) > 1 else sums[path])
            else:
                _store(slot, parameter, sums[path])
    for slot, parameter in merged.others:
        _store(slot, copy(parameter), parameter.clone())
    for name, part in merged.parts.items():
        replace_module(model, name, _base(part))


def _store(slot: Slot, parameter: Any, weight: Any) -> None:
    """Let `parameter` hold `weight` and stand in its slot."""
    parameter.data = weight.data
    setattr(slot.owner, slot.name, parameter)
    if hasattr(parameter, "quant_state"):
        parameter.quant_state = slot.owner.quant_state = weight.quant_state


def _say_tied(configs: tuple[Any, ...], tied: bool) -> None:
    for config in configs:
        if getattr(config, FLAG) is not tied:
            setattr(config, FLAG, tied)
