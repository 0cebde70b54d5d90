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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.errors import LoraError

WITHOUT_EFFECT = frozenset(
    {"sliding_window", "position_ids", "use_cache", "cache_position", "is_causal"}
)
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

    def __init__(self, segments: Sequence[Segment], visible: Tensor | None = None) -> None:
        """Combine the segments with what the layer itself lets an example see.

        Args:
            segments: of the pack, in order.
            visible: (L, L) of bool for an example of L tokens, at least the longest; True where a row may look at a column. None
                is plainly causal.
        """
        self.lengths = [segment.length for segment in segments]
        if visible is None:
            self.masks = [segment.mask for segment in segments]
            return
        causal = _causal_length(visible)
        is_causal = [segment.mask is None and segment.length <= causal for segment in segments]
        self.masks = [
            None if plain else _within(segment, visible)
            for plain, segment in zip(is_causal, segments, strict=True)
        ]


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
        raise AttentionError(
            "a mask is asked for while no pack is being read; read the pack inside `reading`"
        )
    return segments


@dataclass(frozen=True)
class AttentionOptions:
    """What a model asks of its attention besides the mask."""

    scaling: float | None = None
    """Factor of the scores; 1/√E where it is left out."""
    dropout: float = 0.0
    """Probability of dropping an attention weight."""
    softcap: float | None = None
    """Bound of the scores."""
    s_aux: Tensor | None = None
    """(H,) logits of the sinks."""

    @classmethod
    def of(cls, options: Mapping[str, Any], module: nn.Module) -> "AttentionOptions":
        """Take from what a model passes; raise AttentionError where it asks for anything else."""
        known = {field.name for field in fields(cls)}
        for name, value in options.items():
            if name not in known | WITHOUT_EFFECT and value is not None and value is not False:
                raise AttentionError(
                    f"{type(module).__name__} passes its attention {name}, which packed attention does not compute"
                )
        if options.get("is_causal") is False:
            raise AttentionError(
                f"{type(module).__name__} attends in both directions, which packed attention does not compute"
            )
        return cls(**{name: value for name, value in options.items() if name in known})


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
        module: the attention module, which an error names.
        query, key, value: see the module's shapes.
        attention_mask: the pack's, for this kind of layer.
        options: see `AttentionOptions`; a model passes more.

    Raises:
        AttentionError: the mask is not a pack's, or an option is set that this does not compute.
    """
    asked = AttentionOptions.of(options, module)
    mask = _mask_of_pack(module, query, attention_mask)
    attend = _kernel(asked)
    pieces = zip(
        *(states.split(mask.lengths, dim=2) for states in (query, key, value)),
        mask.masks,
        strict=True,
    )
    return torch.cat(
        [attend(q, k, v, own, asked).transpose(1, 2) for q, k, v, own in pieces], dim=1
    ), None


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionOptions], Tensor]


def _kernel(options: AttentionOptions) -> Kernel:
    """Choose what computes the attention of a segment."""
    if options.softcap is not None:
        return _capped
    return _plain if options.s_aux is None else _with_sinks


def _mask_of_pack(module: nn.Module, query: Tensor, mask: object) -> PackMask:
    """Return the mask; refuse one that is not this pack's."""
    where = type(module).__name__
    if not isinstance(mask, PackMask):
        raise AttentionError(
            f"{where} attends under {type(mask).__name__}, which is not the mask of a pack"
        )
    if query.shape[0] != 1 or query.shape[2] != sum(mask.lengths):
        raise AttentionError(
            f"{where} attends over {tuple(query.shape)}, and the pack is one row of {sum(mask.lengths)} tokens"
        )
    return mask


def _causal_length(visible: Tensor) -> int:
    """Return up to how many tokens an example sees as it would causally; synchronizes with a GPU, once for all segments."""
    differs = (visible != torch.ones_like(visible).tril()).any(dim=1)
    return int(
        torch.cat([differs, differs.new_ones(1)]).int().argmax()
    )  # the first row that differs


def _within(segment: Segment, visible: Tensor) -> Tensor:
    """Return the mask (length, length) of a segment."""
    if segment.mask is None:
        return visible[: segment.length, : segment.length]
    depths = segment.depths
    return segment.mask & visible[depths[:, None], depths[None, :]]


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attend by the fastest kernel that PyTorch has for the mask."""
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=options.dropout,
        is_causal=mask is None,
        scale=options.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attend with sinks: one more key, of zeros, whose score is the sink's logit, and whose value is zero."""
    heads, length = q.shape[1], q.shape[2]
    bias = torch.zeros(length, length, dtype=q.dtype, device=q.device).masked_fill(
        ~_allowed(q, mask), -torch.inf
    )
    bias = torch.cat([bias.expand(heads, length, length), _sink_column(q, options)[0]], dim=2)[None]
    return F.scaled_dot_product_attention(
        q,
        F.pad(k, (0, 0, 0, 1)),
        F.pad(v, (0, 0, 0, 1)),
        attn_mask=bias,
        dropout_p=options.dropout,
        scale=options.scaling,
        enable_gqa=heads != k.shape[1],
    )


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attend under a bound of the scores, step by step: no kernel of PyTorch has one."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (
        q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if options.scaling is None else options.scaling)
    )
    assert options.softcap is not None, "this kernel is chosen for it"
    scores = (options.softcap * torch.tanh(scores / options.softcap)).masked_fill(
        ~_allowed(q, mask), -torch.inf
    )
    if options.s_aux is not None:
        scores = torch.cat([scores, _sink_column(q, options)], dim=3)
    weights = torch.softmax(scores, dim=3, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=options.dropout)[..., :length] @ v


def _allowed(q: Tensor, mask: Tensor | None) -> Tensor:
    """Return a mask as a tensor (L, L)."""
    length = q.shape[2]
    return (
        torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        if mask is None
        else mask
    )


def _sink_column(q: Tensor, options: AttentionOptions) -> Tensor:
    """Return the sinks' logits as one more column of scores, (1, H, L, 1)."""
    assert options.s_aux is not None, "a model with sinks has a logit for each head"
    return options.s_aux.to(q.dtype).view(1, -1, 1, 1).expand(1, q.shape[1], q.shape[2], 1)
