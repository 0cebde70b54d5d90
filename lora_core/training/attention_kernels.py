"""Attention over one segment of a pack: with the fastest kernel, with sinks, or with capped scores.

Shapes: q (1, H, L, E), k (1, K, L, E), v (1, K, L, V) with H a multiple of K (grouped heads), mask
(L, L) of bool or None for a causal one, result (1, H, L, V).

Sources: attention sinks as in gpt-oss (a logit per head that takes probability and returns
nothing); soft-capped scores, cap · tanh(score / cap), as in Gemma 2 (2024, arXiv 2408.00118).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.errors import LoraError
from lora_core.layers.functional import without_autocast
from lora_core.training.short_attention import is_short, short_causal

WITHOUT_EFFECT = frozenset(
    {"sliding_window", "position_ids", "use_cache", "cache_position", "is_causal"}
)
"""Options without effect here: the mask has windows and causality, and there is no cache."""


class AttentionError(LoraError, ValueError):
    """A model sets an attention option that packed attention does not support."""


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
        """Select from what a model passes to its attention function.

        Args:
            options: by name; None and False are unset.
            module: the attention module, which errors name.

        Raises:
            AttentionError: an option is set that is not supported.
        """
        where = type(module).__name__
        known = {field.name for field in fields(cls)}
        selected = {}
        for name, value in options.items():
            is_set = value is not None and value is not False
            if name in known:
                selected[name] = value
            elif is_set and name not in WITHOUT_EFFECT:
                raise AttentionError(
                    f"{where} passes its attention {name}, which packed attention does not compute"
                )
        if options.get("is_causal") is False:
            raise AttentionError(
                f"{where} attends in both directions, which packed attention does not compute"
            )
        return cls(**selected)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionOptions], Tensor]
"""Computes a segment from q, k, v and its mask."""


def kernel_for(options: AttentionOptions) -> Kernel:
    """Select the function that computes the attention of a segment.

    Args:
        options: of the model.
    """
    if options.softcap is not None:
        return _capped
    if options.s_aux is not None:
        return _with_sinks
    return _plain


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Attend with the fastest kernel that PyTorch has for the mask.

    On a CPU that is the one in float32, because the backward pass of the one in 16 bits is slow.
    Autocast would choose the latter.
    """
    if q.device.type != "cpu":
        return _scaled_dot_product(q, k, v, mask, options)
    if mask is None and options.dropout == 0 and is_short(q, v):
        return short_causal(q, k, v, options.scaling)
    with without_autocast(q):
        output = _scaled_dot_product(_wide(q), _wide(k), _wide(v), mask, options)
    return output.to(v.dtype)


def _scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
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


def _wide(x: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Attend with sinks: an additional key whose score is the sink's logit and whose value is 0.

    The key itself is zero; its logit is added by the mask.
    """
    _, heads, length, _ = q.shape
    hidden = ~_allowed(q, mask)
    bias_LL = torch.zeros(length, length, dtype=q.dtype, device=q.device)
    bias_LL = bias_LL.masked_fill(hidden, -torch.inf)
    bias_HLL = bias_LL.expand(heads, length, length)
    sinks_HL1 = _sink_column(q, options)[0]
    bias = torch.cat([bias_HLL, sinks_HL1], dim=2)
    one_more_key = (0, 0, 0, 1)
    return F.scaled_dot_product_attention(
        q,
        F.pad(k, one_more_key),
        F.pad(v, one_more_key),
        attn_mask=bias[None],
        dropout_p=options.dropout,
        scale=options.scaling,
        enable_gqa=heads != k.shape[1],
    )


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Attend with bounded scores, step by step: PyTorch has no kernel for it."""
    _, heads, length, width = q.shape
    queries_per_key = heads // k.shape[1]
    k = k.repeat_interleave(queries_per_key, dim=1)
    v = v.repeat_interleave(queries_per_key, dim=1)
    scaling = width**-0.5 if options.scaling is None else options.scaling
    scores = q @ k.transpose(2, 3) * scaling
    cap = options.softcap
    assert cap is not None, "this kernel is selected by the softcap"
    scores = cap * torch.tanh(scores / cap)
    hidden = ~_allowed(q, mask)
    scores = scores.masked_fill(hidden, -torch.inf)
    if options.s_aux is not None:
        sinks = _sink_column(q, options)
        scores = torch.cat([scores, sinks], dim=3)
    weights = torch.softmax(scores, dim=3, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=options.dropout)
    without_sinks = weights[..., :length]
    return without_sinks @ v


def _allowed(q: Tensor, mask: Tensor | None) -> Tensor:
    """Return a mask as a tensor (L, L)."""
    if mask is not None:
        return mask
    length = q.shape[2]
    everything = torch.ones(length, length, dtype=torch.bool, device=q.device)
    return everything.tril()


def _sink_column(q: Tensor, options: AttentionOptions) -> Tensor:
    """Return the sinks' logits as an additional column of scores, (1, H, L, 1)."""
    assert options.s_aux is not None, "a model with sinks has a logit for each head"
    _, heads, length, _ = q.shape
    logits = options.s_aux.to(q.dtype)
    return logits.view(1, -1, 1, 1).expand(1, heads, length, 1)
