"""Damage in an adapter's files: what keeps it from being loaded, or makes its outputs wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_core.adapter.contents import AdapterContents, Factors
from lora_core.adapter.peft_config import read_config
from lora_core.errors import AdapterError

EXAMPLES = 3
"""How many modules or keys a text names."""


@dataclass(frozen=True)
class Anomaly:
    """Something unusual about an adapter."""

    kind: str
    """See the table in anomalies.py."""
    text: str
    is_damage: bool = False
    """Whether the adapter cannot be used as it is."""


def find_damage(contents: AdapterContents) -> Iterator[Anomaly]:
    """Yield what is damaged."""
    for change in contents.changes:
        yield Anomaly("keys", f"{change}; convert the adapter to peft for other programs")
    yield from _config(contents)
    yield from _tensors(contents)
    yield from _pairs(contents)
    yield from _ranks(contents)


def examples(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    listed = ", ".join(names[:EXAMPLES])
    more = len(names) - EXAMPLES
    return f"{listed} and {more} more" if more > 0 else listed


def _config(contents: AdapterContents) -> Iterator[Anomaly]:
    try:
        read_config(contents.folder)
    except AdapterError as error:
        yield Anomaly("config", str(error), is_damage=True)


def _tensors(contents: AdapterContents) -> Iterator[Anomaly]:
    if not contents.factors:
        yield Anomaly("pair", "the file holds no factor of an update", is_damage=True)
    empty = [key for key, tensor in contents.tensors.items() if not tensor.numel()]
    if empty:
        text = f"{len(empty)} tensors are empty: {examples(empty)}; "
        text += "save the adapter again from gathered weights"
        yield Anomaly("empty", text, is_damage=True)
    broken = []
    for key, tensor in contents.tensors.items():
        if not torch.isfinite(tensor).all():
            broken.append(key)
    if broken:
        text = f"{len(broken)} tensors hold values that are not finite: {examples(broken)}; "
        text += "train again with a lower learning rate"
        yield Anomaly("values", text, is_damage=True)


def _pairs(contents: AdapterContents) -> Iterator[Anomaly]:
    without_a = [name for name, each in contents.factors.items() if each.a is None]
    without_b = [name for name, each in contents.factors.items() if each.b is None]
    for letter, names in (("A", without_a), ("B", without_b)):
        if names:
            text = f"{len(names)} updates lack {letter}: {examples(names)}; "
            text += "fetch or train the adapter again"
            yield Anomaly("pair", text, is_damage=True)
    misfits = [name for name, each in contents.layers.items() if _is_misfit(each)]
    if misfits:
        text = f"{len(misfits)} updates have an A and a B that do not fit each other: "
        text += f"{examples(misfits)}; fetch or train the adapter again"
        yield Anomaly("pair", text, is_damage=True)


def _is_misfit(factors: Factors) -> bool:
    are_there = factors.a is not None and factors.b is not None
    return are_there and factors.pair is None and all(each.numel() for each in factors.tensors)


def _ranks(contents: AdapterContents) -> Iterator[Anomaly]:
    above: list[str] = []
    different: list[str] = []
    for name, factors in contents.layers.items():
        if factors.pair is None:
            continue
        a, b = factors.pair
        rank = a.shape[0]
        side = min(b.shape[0], a.shape[1])
        if rank > side:
            above.append(f"{name} ({rank} > {side})")
        expected = contents.scales.rank_of(name)
        if rank != expected:
            different.append(f"{name} ({rank} instead of {expected})")
    if above:
        text = f"{len(above)} updates have a rank above a side of their weight: {examples(above)}"
        yield Anomaly("rank", text)
    if different:
        text = f"{len(different)} updates have another rank than the config gives: "
        text += f"{examples(different)}; correct r or rank_pattern in adapter_config.json"
        yield Anomaly("rank", text, is_damage=True)
