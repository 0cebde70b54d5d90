"""Read packs with a model: several examples in one row, or one after the other by the model's own forward.

    packed       one pass over the row; attention inside each segment, positions from each example's own beginning
    one by one   a pass for each example, unpadded, by transformers' eager attention; a tree's answers are read one after the
                 other, each with its whole prompt

Either way what comes out are the rows of the positions that predict: hidden states (N, D) where the head is a product in
closed form, else the logits (N, V) as the model itself forms them.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lora_core.training.attention import PackMask, packed_attention, reading, segments_being_read
from lora_core.training.losses import target_log_likelihoods
from pipelines.models.head import Head, linear_head
from pipelines.models.packs import Pack
from pipelines.models.support import text_body, why_not_packed

EAGER_TOKENS = 2048
"""Longest example that is read by eager attention whatever the family offers."""
PACKED, EAGER, SDPA = "packed", "eager", "sdpa"
"""Names of attention functions, as transformers knows them."""


def packed_mask(*, mask_function: Any, device: Any, use_vmap: bool = False, **_: Any) -> PackMask:
    """Return who attends to whom in the pack that is being read, for layers of one kind; the signature is transformers'.

    Args:
        mask_function: says whether one position of an example may look at another: causal, within a window or a chunk.
        device: of the mask.
        use_vmap: whether the mask function takes single positions only.
    """
    segments = segments_being_read()
    if mask_function is causal_mask_function:
        return PackMask(segments)
    longest = max(segment.length for segment in segments)
    visible = sdpa_mask(
        batch_size=1,
        q_length=longest,
        kv_length=longest,
        mask_function=mask_function,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    assert visible is not None, "a mask is always made where it may not be skipped"
    return PackMask(segments, visible[0, 0])


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)


@dataclass(frozen=True)
class PackReader:
    """A model, and the way in which it reads packs."""

    model: PreTrainedModel
    packed: bool
    """Several examples in one pass, or each by itself."""
    head: Head | None
    """In closed form; None where the model forms its own logits."""

    @classmethod
    def default(cls, model: PreTrainedModel) -> "PackReader":
        """Return the fastest reader that nothing known beforehand speaks against."""
        return cls(model, why_not_packed(model) is None, linear_head(model))

    @property
    def path(self) -> str:
        """Name the way, as a result and a report have it."""
        return "packed" if self.packed else "one by one"

    @property
    def attention(self) -> str:
        """Name the attention function by which most examples are read."""
        return PACKED if self.packed else EAGER

    def rows(self, pack: Pack) -> Tensor:
        """Return hidden states (N, D) or logits (N, V) of the positions of a pack that predict."""
        return self._packed(pack) if self.packed else self._one_by_one(pack)

    def loss(self, pack: Pack) -> Tensor:
        """Return the pack's summed negative log-likelihood in nats."""
        rows = self.rows(pack)
        if self.head is not None:
            return self.head.loss(rows, pack.targets)
        return F.cross_entropy(rows.float(), pack.targets, reduction="sum")

    def log_likelihoods(self, pack: Pack, chunk_rows: int) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of each target in nats, and whether it is the likeliest token there."""
        rows = self.rows(pack)
        if self.head is not None:
            return self.head.log_likelihoods(rows, pack.targets, chunk_rows)
        parts = zip(rows.split(chunk_rows), pack.targets.split(chunk_rows), strict=True)
        likelihoods, greedy = zip(
            *(target_log_likelihoods(part.float().clone(), wanted) for part, wanted in parts),
            strict=True,
        )
        return torch.cat(likelihoods), torch.cat(greedy)

    def logits(self, pack: Pack) -> Tensor:
        """Return the logits (N, V) in float32 of the positions that predict."""
        rows = self.rows(pack)
        return rows.float() if self.head is None else self.head.logits(rows)

    def _packed(self, pack: Pack) -> Tensor:
        inputs = {"input_ids": pack.input_ids[None], "position_ids": pack.position_ids[None]}
        set_attention(self.model, PACKED)
        everywhere = torch.ones_like(
            inputs["input_ids"], dtype=torch.bool
        )  # else positions would be taken for a pack's a second time
        with reading(pack.segments):
            if self.head is not None:
                return _hidden_states(self.model, **inputs, attention_mask=everywhere)[
                    pack.predicts
                ]
            return _own_logits(self.model, pack.predicts, **inputs, attention_mask=everywhere)

    def _one_by_one(self, pack: Pack) -> Tensor:
        found, order = list[Tensor](), list[Tensor]()
        set_attention(
            self.model, own_attention(self.model, pack.longest)
        )  # of all: a block that is computed again finds the same
        for path in pack.paths():
            ids = pack.input_ids[path.places][None]
            if self.head is None:
                found.append(
                    self.model(input_ids=ids, **_without_cache(self.model)).logits[0][path.at]
                )
            else:
                found.append(_hidden_states(self.model, input_ids=ids)[path.at])
            order.append(path.rows)
        return torch.cat(found)[torch.cat(order).argsort()]


def own_attention(model: PreTrainedModel, tokens: int) -> str:
    """Name the attention function by which a model reads one example alone.

    Eager attention is what transformers defines a family by, and takes memory by the square of the tokens: long examples are
    read by PyTorch's kernels where the family offers them. They refuse capped scores, and families with sinks do not offer them.
    """
    text = model.config.get_text_config()
    offered = (
        bool(getattr(text_body(model), "_supports_sdpa", False))
        and getattr(text, "attn_logit_softcapping", None) is None
    )
    return SDPA if tokens > EAGER_TOKENS and offered else EAGER


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention function of a language model that has a choice; one that has none computes its own."""
    body = text_body(model)
    if not isinstance(body, PreTrainedModel):
        body = model
    if body.config._attn_implementation != name and body._can_set_attn_implementation():
        body.set_attn_implementation(name)


@contextmanager
def attending_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model attend by another function inside a block."""
    before = model.config.get_text_config()._attn_implementation
    try:
        set_attention(model, name)
        yield
    finally:
        set_attention(model, before)


def read_through(model: PreTrainedModel, pack: Pack) -> None:
    """Push the examples of a pack through a model's own body, one by one, for what its layers are seen to read."""
    for path in pack.paths():
        set_attention(model, own_attention(model, len(path.places)))
        _hidden_states(model, input_ids=pack.input_ids[path.places][None])


def _hidden_states(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Return the last hidden states (T, D) of one row."""
    body = text_body(model)
    output = body(**inputs, **_without_cache(body))
    states: Tensor = output.last_hidden_state[0]
    return states


def _own_logits(model: PreTrainedModel, positions: Tensor, **inputs: Tensor) -> Tensor:
    """Return the logits (N, V) of some positions of one row, as the model forms them."""
    if "logits_to_keep" in _parameters(type(model).forward):
        kept: Tensor = model(**inputs, **_without_cache(model), logits_to_keep=positions).logits[0]
        return kept
    every: Tensor = model(**inputs, **_without_cache(model)).logits[0]
    return every[positions]


def _without_cache(module: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in _parameters(type(module).forward) else {}


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """Return the names of what a module's forward takes."""
    return frozenset(inspect.signature(forward).parameters)
