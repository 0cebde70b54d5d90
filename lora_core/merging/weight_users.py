"""Which modules use a weight that a merge changes, and which of them change with it.

An adapter over one user of a shared weight, such as a tied output head, changes only what that user
computes, and so does its merge. Rows that embedding and head train together stay shared.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lora_core.base.sharing import Slot, memory_of, slots
from lora_core.errors import MergeError
from lora_core.layers.trained import TiedEmbedding, TiedHead
from lora_core.merging.merged_values import base_of


class Holder(NamedTuple):
    """A slot in the base and the parameter object that it holds before the merge."""

    slot: Slot
    parameter: nn.Parameter


@dataclass(frozen=True)
class WeightUsers:
    """The users of the weights that a merge changes."""

    changed: dict[str, list[Holder]]
    """Parameter path → the slots that share it and change together; at least one."""
    others: dict[str, list[Slot]]
    """Parameter path → other slots with the same weight, which keep their value.

    Paths without any are absent.
    """

    def left_in_a_tie(self) -> list[Holder]:
        """Return the users that must leave a tie of more than two when one has left.

        Otherwise a saved file would use the tensor of the changed one for some of the rest.
        """
        changed: list[Slot] = []
        for holders in self.changed.values():
            changed += (holder.slot for holder in holders)
        left: dict[Slot, nn.Parameter] = {}
        for found in self.others.values():
            if len(found) < 2:
                continue
            for slot in found:
                if slot not in changed:
                    left[slot] = slot.parameter
        return [Holder(slot, parameter) for slot, parameter in left.items()]


def find_users(
    model: nn.Module,
    parts: Mapping[str, nn.Module],
    paths: Collection[str],
) -> WeightUsers:
    """Return the users of each weight that changes.

    Args:
        model: has the adapter; not changed.
        parts: module path → the adapter's part at that path.
        paths: the parameters that change.
    """
    users: dict[Hashable, list[Slot]] = defaultdict(list)
    for slot in slots(model):
        users[memory_of(slot.parameter)].append(slot)
    changed: dict[str, list[Holder]] = {}
    others: dict[str, list[Slot]] = {}
    for path in paths:
        holders = _holders(parts, path)
        changed[path] = holders
        own = [holder.slot for holder in holders]
        memory = memory_of(own[0].parameter)
        found = [slot for slot in users[memory] if slot not in own]
        if found:
            others[path] = found
    return WeightUsers(changed, others)


def refuse_reused_modules(model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Refuse a model that uses a module of an adapted base outside the adapter as well.

    It would get the merged weight there too.

    Args:
        model: has the adapter.
        parts: module path → the adapter's part at that path.

    Raises:
        MergeError: a module is at another path too.
    """
    everywhere = _count_uses(model)
    for name, part in parts.items():
        base = base_of(part)
        inside = _count_uses(base)
        inside[id(base)] += 1  # as the base of its part
        if any(everywhere[module] > inside[module] for module in inside):
            raise MergeError(
                f"{name} is in the model at another path too, which the adapter leaves alone; "
                "give that path its own copy"
            )


def _holders(parts: Mapping[str, nn.Module], path: str) -> list[Holder]:
    """Return the slots of the parameter at `path` in the base under its part.

    They include the head and the embeddings that use what another embedding trains.
    """
    name = _part_of(path, parts)
    base = base_of(parts[name])
    parameter = base.get_parameter(path.removeprefix(f"{name}."))
    holders: list[Holder] = []
    for slot in slots(base):
        if slot.parameter is parameter:
            holders.append(Holder(slot, parameter))
    for part in parts.values():
        if not isinstance(part, TiedHead | TiedEmbedding):
            continue
        if part.embedding is parts[name]:
            slot = Slot(base_of(part), "weight")
            holders.append(Holder(slot, slot.parameter))
    return holders


def _part_of(path: str, parts: Collection[str]) -> str:
    """Return the path of the innermost part that contains the parameter at `path`."""
    longest_first = sorted(parts, key=len, reverse=True)
    return next(name for name in longest_first if path.startswith(f"{name}."))


def _count_uses(module: nn.Module) -> Counter[int]:
    """Count the places under `module` that refer to each module, by id."""
    uses: Counter[int] = Counter()
    for parent in module.modules():
        for child in parent._modules.values():
            if child is not None:
                uses[id(child)] += 1
    return uses
