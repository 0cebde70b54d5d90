"""Attention inside each segment of a pack: no padding, and no example sees another.

Several examples are laid out one after the other in a single row of T tokens. Each segment attends within itself, as the
layer's own mask says of two positions of an example: causally, within a window, within a chunk. A segment may also be a
tree of answers that share a prompt; a token then sees its ancestors alone, and its position is its depth, so windows and
chunks are counted along the path from the root, as in the example read alone.

    A(i, j) = ancestor(i, j) ∧ visible(depth i, depth j)

Cost is the sum of the squared segment lengths, not the squared sum.

Shapes: query (1, H, T, E), key (1, K, T, E), value (1, K, T, V) with H a multiple of K (grouped heads), result (1, T, H, V).

Sources: attention sinks as gpt-oss has them (a logit for each head that takes probability and returns nothing); soft-capped
scores, cap · tanh(score / cap), as in Gemma 2 (2024, arXiv 2408.00118).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.errors import LoraError

WITHOUT_EFFECT = frozenset({"sliding_window", "position_ids", "use_cache", "cache_position", "is_causal"})
"""Options that change nothing here: windows and causality are in the mask, and there is no cache."""


class AttentionError(LoraError, ValueError):
    """A model asks its attention for something that packed attention does not compute."""


@dataclass(frozen=True)
class Segment:
    """One example of a pack, or one tree of answers."""

    length: int
    """Number of tokens."""
    mask: Tensor | None = None
    """(length, length) of bool, True where the column is the row's token or an ancestor of it; None for a plain example."""

    @cached_property
    def depths(self) -> Tensor:
        """(length,) position of each token in its own example."""
        return torch.arange(self.length) if self.mask is None else self.mask.sum(dim=1) - 1


class PackMask:
    """Who attends to whom in a pack, for the layers of one kind."""

    def __init__(self, segments: Sequence[Segment], visible: Tensor) -> None:
        """Combine the segments with what the layer itself lets an example see.

        Args:
            segments: of the pack, in order.
            visible: (L, L) of bool for an example of L tokens, at least the longest; True where a row may look at a column.
        """
        self.lengths = [segment.length for segment in segments]
        self.masks = [_within(segment, visible) for segment in segments]


_segments: ContextVar[Sequence[Segment] | None] = ContextVar("segments", default=None)


@contextmanager
def reading(segments: Sequence[Segment]) -> Iterator[None]:
    """Let masks that are made inside the block be those of a pack of `segments`."""
    token = _segments.set(segments)
    try:
        yield
    finally:
        _segments.reset(token)


def segments_being_read() -> Sequence[Segment]:
    """Return the segments of the pack that is being read.

    Raises:
        AttentionError: none is: the model makes a mask outside the pass that reads the pack.
    """
    segments = _segments.get()
    if segments is None:
        raise AttentionError("a mask is asked for while no pack is being read; read the pack inside `reading`")
    return segments


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "PackMask | Tensor | None",
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within segments; the signature is Hugging Face's for attention functions.

    Args:
        module: the attention module, which an error names.
        query, key, value: see the module's shapes.
        attention_mask: the pack's, for this kind of layer.
        scaling: factor of the scores; 1/√E where it is left out.
        dropout: probability of dropping an attention weight.
        softcap: bound of the scores; see the module's sources.
        s_aux: (H,) logits of the sinks.
        options: anything else that a model passes.

    Raises:
        AttentionError: the mask is not a pack's, or an option is set that this does not compute.
    """
    _check(module, query, attention_mask, options)
    assert isinstance(attention_mask, PackMask)
    grouped = query.shape[1] != key.shape[1]
    pieces = zip(*(states.split(attention_mask.lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = []
    for (q, k, v), mask in zip(pieces, attention_mask.masks, strict=True):
        if softcap is not None:
            one = _capped(q, k, v, mask, scaling=scaling, dropout=dropout, softcap=softcap, sinks=s_aux)
        elif s_aux is not None:
            one = _with_sinks(q, k, v, mask, scaling=scaling, dropout=dropout, sinks=s_aux)
        else:
            one = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        attended.append(one.transpose(1, 2))
    return torch.cat(attended, dim=1), None


def _check(module: nn.Module, query: Tensor, mask: object, options: dict[str, Any]) -> None:
    """Refuse whatever would be computed otherwise than the model means it."""
    where = type(module).__name__
    if not isinstance(mask, PackMask):
        raise AttentionError(f"{where} attends under {type(mask).__name__}, which is not the mask of a pack")
    if query.shape[0] != 1 or query.shape[2] != sum(mask.lengths):
        raise AttentionError(f"{where} attends over {tuple(query.shape)}, and the pack is one row of {sum(mask.lengths)} tokens")
    for name, value in options.items():
        if name not in WITHOUT_EFFECT and value is not None and value is not False:
            raise AttentionError(f"{where} passes its attention {name}, which packed attention does not compute")
    if options.get("is_causal") is False:
        raise AttentionError(f"{where} attends in both directions")


def _within(segment: Segment, visible: Tensor) -> Tensor | None:
    """Return the mask (length, length) of a segment; None where it is plainly causal."""
    length = segment.length
    if segment.mask is None:
        own = visible[:length, :length]
        causal = torch.ones_like(own).tril()
        return None if torch.equal(own, causal) else own
    depths = segment.depths
    return segment.mask & visible[depths[:, None], depths[None, :]]


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float | None, dropout: float, sinks: Tensor
) -> Tensor:
    """Attend with a sink: one more key, of zeros, whose score is the sink's logit, and whose value is zero."""
    heads, length = q.shape[1], q.shape[2]
    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril() if mask is None else mask
    bias = torch.zeros(length, length, dtype=q.dtype, device=q.device).masked_fill(~allowed, -torch.inf)
    column = sinks.to(q.dtype).view(heads, 1, 1).expand(heads, length, 1)
    bias = torch.cat([bias.expand(heads, length, length), column], dim=2)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scaling, enable_gqa=heads != k.shape[1])


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attend under a bound of the scores, step by step: no kernel of PyTorch has one."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril() if mask is None else mask
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, q.shape[1], length, 1)
        scores = torch.cat([scores, column], dim=3)
    weights = torch.softmax(scores, dim=3, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=dropout)[..., :length] @ v
