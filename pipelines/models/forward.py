"""Read packs with a model: several examples in one row, or one after the other.

    packed       one pass over the row; attention inside each segment, positions from the beginning
                 of each example
    one by one   a pass for each example, unpadded, by transformers' eager attention; the answers of
                 a tree are read one after the other, each with its complete prompt

Both return the rows of the positions that predict: hidden states (N, D) if the head is a product in
closed form, else the logits (N, V) as the model itself computes them.

On a CPU, a training may compute the model's products with weights in 16 bits, under autocast. Then
its states, its attention, the logits and the loss stay in float32.
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

from lora_core.training.attention import (
    PackMask,
    current_segments,
    packed_attention,
    use_segments,
)
from lora_core.training.losses import target_log_likelihoods
from pipelines.models.head import Head, linear_head
from pipelines.models.packs import Pack
from pipelines.models.support import text_body, why_not_packed
from pipelines.runtime.interfaces.verified import ONE_BY_ONE, PACKED_PATH, Verified

EAGER_TOKENS = 2048
"""Longest example that is read by eager attention even if the family offers other kernels."""
PACKED, EAGER, SDPA = "packed", "eager", "sdpa"
"""Names of attention functions in transformers."""


def packed_mask(*, mask_function: Any, device: Any, use_vmap: bool = False, **_: Any) -> PackMask:
    """Return who attends to whom in the pack that is being read, for layers of one kind.

    The signature is that of transformers.

    Args:
        mask_function: whether one position of an example may attend to another: causal, within a
            window or within a chunk.
        device: of the mask.
        use_vmap: whether the mask function takes single positions only.
    """
    segments = current_segments()
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
    assert visible is not None, "sdpa_mask returns a mask if it may not skip it"
    return PackMask(segments, visible[0, 0])


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)


@dataclass(frozen=True)
class PackReader:
    """A model and how it reads packs."""

    model: PreTrainedModel
    packed: bool
    """Several examples in one pass, or each by itself."""
    head: Head | None
    """In closed form; None if the model computes its own logits."""
    products: torch.dtype | None = None
    """Dtype of products with weights under autocast; None for that of the model, or of an autocast
    around the call."""

    @classmethod
    def default(cls, model: PreTrainedModel) -> "PackReader":
        """Return the fastest reader that is not known to be wrong."""
        return cls(model, why_not_packed(model) is None, linear_head(model))

    @classmethod
    def of(cls, model: PreTrainedModel, verified: Verified) -> "PackReader":
        """Return the reader that a verification of such a model found.

        Args:
            model: of the architecture that was verified.
            verified: the result of the verification.
        """
        head = None if verified.own_head else linear_head(model)
        return cls(model, verified.path == PACKED_PATH, head)

    @property
    def path(self) -> str:
        """The name of this way of reading in results and reports."""
        return PACKED_PATH if self.packed else ONE_BY_ONE

    @property
    def attention(self) -> str:
        """The name of the attention function that reads most examples."""
        return PACKED if self.packed else EAGER

    def rows(self, pack: Pack) -> Tensor:
        """Return hidden states (N, D) or logits (N, V) of the positions of a pack that predict."""
        if self.products is None:
            return self._rows(pack)
        with torch.autocast(pack.input_ids.device.type, self.products):
            rows = self._rows(pack)
        return rows.float()

    def _rows(self, pack: Pack) -> Tensor:
        return self._packed(pack) if self.packed else self._one_by_one(pack)

    def loss(self, pack: Pack) -> Tensor:
        """Return the pack's summed negative log-likelihood in nats."""
        rows = self.rows(pack)
        if self.head is not None:
            return self.head.loss(rows, pack.targets, gradient_dtype=self.products)
        return F.cross_entropy(rows.float(), pack.targets, reduction="sum")

    def log_likelihoods(self, pack: Pack, chunk_rows: int) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of each target in nats, and whether it is the likeliest.

        Args:
            pack: with N targets.
            chunk_rows: number of positions whose logits exist at the same time.

        Returns:
            (N,) float32 and (N,) bool.
        """
        rows = self.rows(pack)
        if self.head is not None:
            return self.head.log_likelihoods(rows, pack.targets, chunk_rows)
        chunks = zip(rows.split(chunk_rows), pack.targets.split(chunk_rows), strict=True)
        likelihoods = []
        greedy = []
        for logits, targets in chunks:
            overwritten = logits.float().clone()
            chunk_likelihoods, chunk_greedy = target_log_likelihoods(overwritten, targets)
            likelihoods.append(chunk_likelihoods)
            greedy.append(chunk_greedy)
        return torch.cat(likelihoods), torch.cat(greedy)

    def logits(self, pack: Pack) -> Tensor:
        """Return the logits (N, V) in float32 of the positions that predict."""
        rows = self.rows(pack)
        return rows.float() if self.head is None else self.head.logits(rows)

    def _packed(self, pack: Pack) -> Tensor:
        ids = pack.input_ids[None]
        inputs = {
            "input_ids": ids,
            "position_ids": pack.position_ids[None],
            # without a mask, transformers would detect packed positions a second time
            "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        }
        set_attention(self.model, PACKED)
        with use_segments(pack.segments):
            if self.head is not None:
                return _hidden_states(self.model, **inputs)[pack.predicts]
            return _own_logits(self.model, pack.predicts, **inputs)

    def _one_by_one(self, pack: Pack) -> Tensor:
        # one function for all examples: a block that is recomputed must use the same one
        set_attention(self.model, own_attention(self.model, pack.longest))
        found = list[Tensor]()
        order = list[Tensor]()
        for path in pack.paths():
            ids = pack.input_ids[path.places][None]
            if self.head is None:
                output = self.model(input_ids=ids, **_without_cache(self.model))
                rows = output.logits[0]
            else:
                rows = _hidden_states(self.model, input_ids=ids)
            found.append(rows[path.at])
            order.append(path.rows)
        in_pack_order = torch.cat(order).argsort()
        return torch.cat(found)[in_pack_order]


def own_attention(model: PreTrainedModel, tokens: int) -> str:
    """Name the attention function by which a model reads one example alone.

    Eager attention is what transformers defines a family by, but its memory grows with the square
    of the tokens. Long examples are therefore read by PyTorch's kernels if the family offers them.
    These kernels refuse capped scores, and families with sinks do not offer them.

    Args:
        model: of any family.
        tokens: of the longest example that is read.
    """
    if tokens <= EAGER_TOKENS:
        return EAGER
    text_config = model.config.get_text_config()
    caps_scores = getattr(text_config, "attn_logit_softcapping", None) is not None
    supports_sdpa = bool(getattr(text_body(model), "_supports_sdpa", False))
    return SDPA if supports_sdpa and not caps_scores else EAGER


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention function of a language model, if the model lets it be chosen.

    Args:
        model: changed in place; its multimodal towers keep theirs.
        name: packed, or one of transformers' names.
    """
    body = text_body(model)
    if not isinstance(body, PreTrainedModel):
        body = model
    if body.config._attn_implementation != name and body._can_set_attn_implementation():
        body.set_attn_implementation(name)


@contextmanager
def attending_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another attention function inside a block.

    Args:
        model: gets its former attention function back, also after an error.
        name: packed, or one of transformers' names.
    """
    before = model.config.get_text_config()._attn_implementation
    try:
        set_attention(model, name)
        yield
    finally:
        set_attention(model, before)


def read_through(model: PreTrainedModel, pack: Pack) -> None:
    """Push each example of a pack through the model's body, for observers of its layers' inputs.

    Args:
        model: without gradients.
        pack: its examples are read one after the other.
    """
    for path in pack.paths():
        attention = own_attention(model, len(path.places))
        set_attention(model, attention)
        ids = pack.input_ids[path.places]
        _hidden_states(model, input_ids=ids[None])


def _hidden_states(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Return the last hidden states (T, D) of one row."""
    body = text_body(model)
    output = body(**inputs, **_without_cache(body))
    states: Tensor = output.last_hidden_state[0]
    return states


def _own_logits(model: PreTrainedModel, positions: Tensor, **inputs: Tensor) -> Tensor:
    """Return the logits (N, V) of some positions of one row, as the model computes them."""
    options: dict[str, Any] = _without_cache(model)
    if "logits_to_keep" in _parameters(type(model).forward):
        kept: Tensor = model(**inputs, **options, logits_to_keep=positions).logits[0]
        return kept
    every: Tensor = model(**inputs, **options).logits[0]
    return every[positions]


def _without_cache(module: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in _parameters(type(module).forward) else {}


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """Return the parameter names of a module's forward."""
    return frozenset(inspect.signature(forward).parameters)
