"""Attention inside each segment of a pack: no padding, and examples do not see each other.

Several examples follow one another in a single row of T tokens. Each segment attends within itself
under the mask that the layer applies to two positions of one example: causal, within a window or
within a chunk. A segment can also be a tree of answers that share a prompt; a token then sees only
its ancestors, and its position is its depth. Windows and chunks count along the path from the root,
as in the example alone.

    A(i, j) = ancestor(i, j) ∧ visible(depth i, depth j)

The cost is the sum of the squared segment lengths, not the squared sum.

Shapes: query (1, H, T, E), key (1, K, T, E), value (1, K, T, V) with H a multiple of K (grouped
heads), result (1, T, H, V).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.training.attention_kernels import AttentionError, AttentionOptions, kernel_for


@dataclass(frozen=True)
class Segment:
    """One example of a pack, or one tree of answers."""

    length: int
    """Number of tokens."""
    mask: Tensor | None = None
    """(length, length) of bool, True if the column is the row's token or an ancestor of it.

    None for a plain example.
    """

    @cached_property
    def depths(self) -> Tensor:
        """(length,) position of each token in its example."""
        if self.mask is None:
            return torch.arange(self.length)
        seen = self.mask.sum(dim=1)
        return seen - 1


class PackMask:
    """The attention mask of a pack, for the layers of one kind."""

    def __init__(self, segments: Sequence[Segment], visible: Tensor | None = None) -> None:
        """Combine the segments with the mask that the layer applies to one example.

        Args:
            segments: of the pack, in order.
            visible: (L, L) of bool for an example of L tokens, at least the longest; True where a
                row may see a column. None is plainly causal.
        """
        self.lengths = [segment.length for segment in segments]
        if visible is None:
            self.masks = [segment.mask for segment in segments]
            return
        causal = _causal_length(visible)
        self.masks = []
        for segment in segments:
            is_causal = segment.mask is None and segment.length <= causal
            mask = None if is_causal else _within(segment, visible)
            self.masks.append(mask)


_segments: ContextVar[Sequence[Segment] | None] = ContextVar("segments", default=None)


@contextmanager
def use_segments(segments: Sequence[Segment]) -> Iterator[None]:
    """Build the masks inside the block for a pack.

    Args:
        segments: of the pack, in order.
    """
    token = _segments.set(segments)
    try:
        yield
    finally:
        _segments.reset(token)


def current_segments() -> Sequence[Segment]:
    """Return the segments of the pack in the current forward pass.

    Raises:
        AttentionError: a model builds a mask outside `use_segments`.
    """
    segments = _segments.get()
    if segments is None:
        raise AttentionError(
            "a model builds a mask without a pack; run the forward pass inside `use_segments`"
        )
    return segments


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "PackMask | Tensor | None",
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within segments; the signature is Hugging Face's for attention functions.

    Args:
        module: the attention module, which errors name.
        query, key, value: see the module's shapes.
        attention_mask: the pack's, for this kind of layer.
        options: see `AttentionOptions`; a model passes more.

    Raises:
        AttentionError: the mask is not a pack's, or an option is set that is not supported.
    """
    selected = AttentionOptions.of(options, module)
    mask = _mask_of_pack(module, query, attention_mask)
    attend = kernel_for(selected)
    queries = query.split(mask.lengths, dim=2)
    keys = key.split(mask.lengths, dim=2)
    values = value.split(mask.lengths, dim=2)
    outputs = []
    for q, k, v, segment_mask in zip(queries, keys, values, mask.masks, strict=True):
        output = attend(q, k, v, segment_mask, selected)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _mask_of_pack(module: nn.Module, query: Tensor, mask: object) -> PackMask:
    """Return the mask if it is this pack's, else raise."""
    where = type(module).__name__
    if not isinstance(mask, PackMask):
        raise AttentionError(
            f"{where} attends under {type(mask).__name__}, which is not the mask of a pack"
        )
    length = sum(mask.lengths)
    if query.shape[0] != 1 or query.shape[2] != length:
        raise AttentionError(
            f"{where} attends over {tuple(query.shape)}, and the pack is one row of {length} tokens"
        )
    return mask


def _causal_length(visible: Tensor) -> int:
    """Return the largest example length for which `visible` is plainly causal.

    This synchronizes with a GPU, once for all segments.
    """
    causal = torch.ones_like(visible).tril()
    differs = (visible != causal).any(dim=1)
    end = differs.new_ones(1)
    ended = torch.cat([differs, end])
    first_that_differs = ended.int().argmax()
    return int(first_that_differs)


def _within(segment: Segment, visible: Tensor) -> Tensor:
    """Return the mask (length, length) of a segment."""
    if segment.mask is None:
        return visible[: segment.length, : segment.length]
    rows = segment.depths[:, None]
    columns = segment.depths[None, :]
    return segment.mask & visible[rows, columns]
