"""Outcomes of loading damaged adapters: refused, equal to the original, or silently different."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from parity.damage import Damage
from torch import Tensor, nn

from lora_core import LoraError, load_adapter
from lora_core.adapter.io import adapter_tensors


@dataclass(frozen=True)
class Tally:
    """The outcomes of one kind of damage."""

    tried: int
    refused: int
    same: int
    """Loaded, and computes the same as the undamaged adapter."""
    silent: int
    """Loaded without an error, and computes something else."""


def tally(
    damages: Iterator[Damage],
    adapter: Path,
    build: Callable[[], nn.Module],
    answer: Callable[[nn.Module], Tensor],
) -> Tally:
    """Apply each damage to a copy of `adapter` and load it.

    Args:
        damages: each changes the files of a folder.
        adapter: the undamaged adapter; not changed.
        build: builds the base it was trained on.
        answer: computes the output of an adapted model.
    """
    copy = adapter.with_name("damaged")
    counts = {"refused": 0, "same": 0, "silent": 0}
    model = build()
    load_adapter(model, adapter)
    expected = _computed(model, answer)
    model = build()
    for damage in damages:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(adapter, copy)
        damage(copy)
        try:
            load_adapter(model, copy)
        except LoraError:
            counts["refused"] += 1  # the model is unchanged and takes the next load
            continue
        outcome = "same" if _equal(_computed(model, answer), expected) else "silent"
        counts[outcome] += 1
        model = build()
    return Tally(sum(counts.values()), **counts)


@torch.no_grad()
def _computed(model: nn.Module, answer: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Return the tensors and the output of an adapter."""
    return {**adapter_tensors(model), "answer": answer(model)}


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in expected
    )
