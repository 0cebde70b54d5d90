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

from collections.abc import Collection, Hashable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.base.sharing import (
    FLAG,
    Slot,
    configs_to_untie,
    memory_of,
    models_of_tied_heads,
)
from lora_core.errors import MergeError
from lora_core.merging.fidelity import Retention
from lora_core.merging.merged_values import base_of, merged_values, retained_updates
from lora_core.merging.weight_users import (
    Holder,
    WeightUsers,
    find_users,
    refuse_reused_modules,
)
from lora_core.modules import adapter_parts, replace_module


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
    refuse_reused_modules(model, parts)
    sums = merged_values(parts, force=force)
    users = find_users(model, parts, sums.keys())
    merged = Merged(
        parts=parts,
        originals=_originals(users),
        retention=retained_updates(parts, sums),
        shared=users.changed,
    )
    return _store(model, merged, sums, users)


@torch.no_grad()
def unmerge(model: nn.Module, merged: Merged) -> None:
    """Undo `merge`: restore the base's original bits, the adapter's parts and the ties.

    Args:
        model: merged; changed in place.
        merged: what `merge` returned for this model.

    Raises:
        MergeError: a later change to the model would be lost or mixed in; the model is unchanged.
    """
    if any(True for _ in adapter_parts(model)):
        raise MergeError(
            "the model carries an adapter that came after the merge, or was never merged; "
            "take that out first"
        )
    for path, memory in _memory_of_weights(merged).items():
        if memory != merged.stored[path]:
            raise MergeError(
                f"{path} is no longer the merged weight: "
                "the model was moved, cast or merged into again; undo that first, "
                "or load the base and the adapter again"
            )
    _undo(model, merged)


def _store(
    model: nn.Module,
    merged: Merged,
    sums: Mapping[str, Tensor],
    users: WeightUsers,
) -> Merged:
    """Store the sums and change the configs, or undo everything; return the complete record."""
    tied = models_of_tied_heads(model)
    if tied:
        merged = replace(merged, untied=users.left_in_a_tie())
    try:
        _store_sums(merged, sums, separate=users.others.keys())
        for name, part in merged.parts.items():
            replace_module(model, name, base_of(part))
        merged = replace(merged, configs=configs_to_untie(tied))
        _set_flag(merged.configs, is_tied=False)
    except BaseException:
        _undo(model, merged)
        raise
    return replace(merged, stored=_memory_of_weights(merged))


def _undo(model: nn.Module, merged: Merged) -> None:
    """Restore the state before the merge, also after a partial merge."""
    for path, original in merged.originals.items():
        for slot, parameter in merged.shared[path]:
            _set_value(slot, parameter, original)
    for slot, parameter in merged.untied:
        _set_value(slot, parameter, parameter)
    for name, part in merged.parts.items():
        replace_module(model, name, part)
    _set_flag(merged.configs, is_tied=True)


def _originals(users: WeightUsers) -> dict[str, Tensor]:
    """Return the stored bits by path; a 4-bit weight keeps its quantization state."""
    originals: dict[str, Tensor] = {}
    for path, holders in users.changed.items():
        stored = holders[0].parameter
        originals[path] = copy(stored) if hasattr(stored, "quant_state") else stored.data
    return originals


def _memory_of_weights(merged: Merged) -> dict[str, Hashable]:
    """Return the memory that each changed weight of the model has now, by path."""
    memory: dict[str, Hashable] = {}
    for path, holders in merged.shared.items():
        slot = holders[0].slot
        memory[path] = memory_of(slot.parameter)
    return memory


def _store_sums(
    merged: Merged,
    sums: Mapping[str, Tensor],
    *,
    separate: Collection[str],
) -> None:
    """Store the sums, and give each user that leaves a tie its own memory.

    The paths in `separate` get a separate parameter: other users keep the shared one.
    """
    for path, holders in merged.shared.items():
        for slot, parameter in holders:
            total = sums[path]
            if path not in separate:
                _set_value(slot, parameter, total)
                continue
            if len(holders) > 1:
                total = total.clone()
            _set_value(slot, copy(parameter), total)
    for slot, parameter in merged.untied:
        _set_value(slot, copy(parameter), parameter.clone())


def _set_value(slot: Slot, parameter: Any, weight: Any) -> None:
    """Set the value of `parameter` to `weight` and put it in its slot."""
    parameter.data = weight.data
    setattr(slot.owner, slot.name, parameter)
    if hasattr(parameter, "quant_state"):
        parameter.quant_state = weight.quant_state
        slot.owner.quant_state = weight.quant_state


def _set_flag(configs: tuple[Any, ...], *, is_tied: bool) -> None:
    for config in configs:
        if getattr(config, FLAG) is not is_tied:
            setattr(config, FLAG, is_tied)
