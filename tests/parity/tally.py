"""What a load makes of damaged adapters: refused, the same, or a silent load of something else."""

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
    """What became of the damages of one kind."""

    tried: int
    refused: int
    same: int
    """Loaded, and computes what the whole adapter computes."""
    silent: int
    """Loaded without a word, and computes something else."""


def tally(
    damages: Iterator[Damage],
    adapter: Path,
    build: Callable[[], nn.Module],
    answer: Callable[[nn.Module], Tensor],
) -> Tally:
    """Do each damage to a copy of `adapter` and load it.

    Args:
        damages: each changes the files of a folder.
        adapter: the whole adapter; not changed.
        build: makes the base it was trained on.
        answer: what an adapted model computes.
    """
    copy, counts = adapter.with_name("damaged"), {"refused": 0, "same": 0, "silent": 0}
    model = build()
    load_adapter(model, adapter)
    whole, model = _computed(model, answer), build()
    for damage in damages:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(adapter, copy)
        damage(copy)
        try:
            load_adapter(model, copy)
        except LoraError:
            counts["refused"] += 1  # and the model is as it was: the next load is put into it
            continue
        counts["same" if _equal(_computed(model, answer), whole) else "silent"] += 1
        model = build()
    return Tally(sum(counts.values()), **counts)


@torch.no_grad()
def _computed(model: nn.Module, answer: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Return all that an adapter says and does."""
    return {**adapter_tensors(model), "answer": answer(model)}


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in expected
    )
