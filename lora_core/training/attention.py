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

Sources: attention sinks as in gpt-oss (a logit per head that takes probability and returns
nothing); soft-capped scores, cap · tanh(score / cap), as in Gemma 2 (2024, arXiv 2408.00118).
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
"""Options without effect here: the mask has windows and causality, and there is no cache."""


class AttentionError(LoraError, ValueError):
    """A model sets an attention option that packed attention does not support."""


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
        return torch.arange(self.length) if self.mask is None else self.mask.sum(dim=1) - 1


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
            self.masks.append(None if is_causal else _within(segment, visible))


_segments: ContextVar[Sequence[Segment] | None] = ContextVar("segments", default=None)


@contextmanager
def use_segments(segments: Sequence[Segment]) -> Iterator[None]:
    """Build the masks inside the block for a pack of `segments`."""
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


@dataclass(frozen=True)
class AttentionOptions:
    """The attention options that a model can set in addition to the mask."""

    scaling: float | None = None
    """Factor of the scores; the default is 1/√E."""
    dropout: float = 0.0
    """Probability of dropping an attention weight."""
    softcap: float | None = None
    """Bound of the scores."""
    s_aux: Tensor | None = None
    """(H,) logits of the sinks."""

    @classmethod
    def of(cls, options: Mapping[str, Any], module: nn.Module) -> "AttentionOptions":
        """Select from what a model passes; raise AttentionError for an unsupported option."""
        known = {field.name for field in fields(cls)}
        for name, value in options.items():
            is_set = value is not None and value is not False
            if name not in known | WITHOUT_EFFECT and is_set:
                raise AttentionError(
                    f"{type(module).__name__} passes its attention {name}, "
                    "which packed attention does not compute"
                )
        if options.get("is_causal") is False:
            raise AttentionError(
                f"{type(module).__name__} attends in both directions, "
                "which packed attention does not compute"
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
        module: the attention module, which errors name.
        query, key, value: see the module's shapes.
        attention_mask: the pack's, for this kind of layer.
        options: see `AttentionOptions`; a model passes more.

    Raises:
        AttentionError: the mask is not a pack's, or an option is set that is not supported.
    """
    selected = AttentionOptions.of(options, module)
    mask = _mask_of_pack(module, query, attention_mask)
    attend = _kernel(selected)
    queries = query.split(mask.lengths, dim=2)
    keys = key.split(mask.lengths, dim=2)
    values = value.split(mask.lengths, dim=2)
    outputs = []
    for q, k, v, segment_mask in zip(queries, keys, values, mask.masks, strict=True):
        output = attend(q, k, v, segment_mask, selected)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionOptions], Tensor]


def _kernel(options: AttentionOptions) -> Kernel:
    """Select the function that computes the attention of a segment."""
    if options.softcap is not None:
        return _capped
    return _plain if options.s_aux is None else _with_sinks


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
    ended = torch.cat([differs, differs.new_ones(1)])
    return int(ended.int().argmax())  # the first row that differs


def _within(segment: Segment, visible: Tensor) -> Tensor:
    """Return the mask (length, length) of a segment."""
    if segment.mask is None:
        return visible[: segment.length, : segment.length]
    depths = segment.depths
    return segment.mask & visible[depths[:, None], depths[None, :]]


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attend with the fastest kernel that PyTorch has for the mask."""
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
    """Attend with sinks: an additional key whose score is the sink's logit and whose value is 0.

    The key itself is zero; its logit is added by the mask.
    """
    heads, length = q.shape[1], q.shape[2]
    bias = torch.zeros(length, length, dtype=q.dtype, device=q.device)
    bias = bias.masked_fill(~_allowed(q, mask), -torch.inf)
    bias = torch.cat([bias.expand(heads, length, length), _sink_column(q, options)[0]], dim=2)
    return F.scaled_dot_product_attention(
        q,
        F.pad(k, (0, 0, 0, 1)),
        F.pad(v, (0, 0, 0, 1)),
        attn_mask=bias[None],
        dropout_p=options.dropout,
        scale=options.scaling,
        enable_gqa=heads != k.shape[1],
    )


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attend with bounded scores, step by step: PyTorch has no kernel for it."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    scaling = q.shape[3] ** -0.5 if options.scaling is None else options.scaling
    scores = q @ k.transpose(2, 3) * scaling
    assert options.softcap is not None, "this kernel is selected by the softcap"
    scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~_allowed(q, mask), -torch.inf)
    if options.s_aux is not None:
        scores = torch.cat([scores, _sink_column(q, options)], dim=3)
    weights = torch.softmax(scores, dim=3, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=options.dropout)[..., :length] @ v


def _allowed(q: Tensor, mask: Tensor | None) -> Tensor:
    """Return a mask as a tensor (L, L)."""
    if mask is not None:
        return mask
    length = q.shape[2]
    return torch.ones(length, length, dtype=torch.bool, device=q.device).tril()


def _sink_column(q: Tensor, options: AttentionOptions) -> Tensor:
    """Return the sinks' logits as an additional column of scores, (1, H, L, 1)."""
    assert options.s_aux is not None, "a model with sinks has a logit for each head"
    logits = options.s_aux.to(q.dtype).view(1, -1, 1, 1)
    return logits.expand(1, q.shape[1], q.shape[2], 1)
