"""Which examples make up which step, and how they are packed for each process.

The order is drawn once from the seed and does not depend on the number of processes: step k takes the same examples
everywhere. Within a step they are dealt out so that each process gets about as many tokens, and each share is one
row without padding.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_core.training.attention import Segment


@dataclass(frozen=True)
class Pack:
    """Several examples in one row of T tokens."""

    input_ids: Tensor
    """(T,)"""
    position_ids: Tensor
    """(T,), starting anew in each example."""
    segments: list[Segment]
    predicts: Tensor
    """(N,) positions whose next token is supervised."""
    targets: Tensor
    """(N,) those next tokens."""


def order(examples: int, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """Return the indices of each step: epochs of the data, each in an order of its own."""
    wanted, drawn, epoch = steps * batch_size, list[int](), 0
    while len(drawn) < wanted:
        indices = list(range(examples))
        random.Random(f"{seed}:{epoch}").shuffle(indices)
        drawn += indices
        epoch += 1
    return [drawn[start : start + batch_size] for start in range(0, wanted, batch_size)]


def shares(indices: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Deal `indices` into `parts` lists of about equal tokens: the longest first, each to the lightest part.

    Args:
        indices: examples of one step; at least `parts` of them.
        lengths: tokens of every example, by index.
        parts: processes × accumulation parts.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        lightest = min(dealt, key=lambda part: (sum(lengths[i] for i in part), len(part)))
        lightest.append(index)
    return dealt


def pack(examples: Sequence[dict[str, Any]], device: str) -> Pack:
    """Put examples one after the other into one row."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    supervised = torch.cat([torch.tensor(example["supervised"]) for example in examples])
    input_ids = torch.cat(ids)
    targets_at = supervised.nonzero()[:, 0]
    return Pack(
        input_ids=input_ids.to(device),
        position_ids=torch.cat([torch.arange(len(one)) for one in ids]).to(device),
        segments=[Segment(len(one)) for one in ids],
        predicts=(targets_at - 1).to(device),
        targets=input_ids[targets_at].to(device),
    )
