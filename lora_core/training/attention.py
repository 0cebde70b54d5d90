"""Attention inside each segment of a pack: no padding, and no example sees another.

Several examples stand one after the other in a single row of T tokens. Each segment attends within itself: causally,
or, where it carries a mask, as the mask says. Cost is the sum of the squared segment lengths, not the squared sum.

Shapes: query (1, H, T, E), key and value (1, K, T, E) with H a multiple of K (grouped heads), result (1, T, H, E).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Segment:
    """One example of a pack."""

    length: int
    """Number of tokens."""
    mask: Tensor | None = None
    """(length, length) of bool, True where a row may look at a column; None is causal."""


def tree_mask(prefix: int, branches: list[int]) -> Tensor:
    """Return the mask of a prefix with branches that continue it side by side.

    A branch sees the prefix and itself, causally, and no other branch: several answers share one prompt.

    Args:
        prefix: number of tokens of the shared prompt.
        branches: number of tokens of each continuation.
    """
    length = prefix + sum(branches)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    owner = torch.cat([torch.zeros(prefix)] + [torch.full((n,), float(i)) for i, n in enumerate(branches, start=1)])
    return causal & ((owner[:, None] == owner[None, :]) | (owner[None, :] == 0))


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend within segments; the signature is Hugging Face's for attention functions.

    Args:
        module: the attention module; only its being there is asked for.
        query, key, value: see the module's shapes.
        attention_mask: unused; the segments say who sees whom.
        options: `segments`, a list of Segment whose lengths add up to T, and `scaling`; the caller passes more.
    """
    segments: list[Segment] = options["segments"]
    lengths = [segment.length for segment in segments]
    parts = zip(segments, query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    grouped = query.shape[1] != key.shape[1]
    attended = [
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=segment.mask, is_causal=segment.mask is None, scale=options.get("scaling"), enable_gqa=grouped
        )
        for segment, q, k, v in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None
