"""What a training step keeps from its forward pass for its backward pass, counted from the shapes of a model's layers.

Each part of a block keeps the numbers that `lora_core.budget.parts` says, in the computation's dtype. Each norm keeps its
input, in float32 where it is written step by step; such a norm that is trained also keeps what it scales. An adapter adds
nothing but the mask of its dropout, and under DoRA each product before its rows are scaled: `lora_linear` saves its input
alone, which readers share. A router keeps the chances of all experts in float32, and, where it is trained, its input.

Attention keeps no table of T × T (FlashAttention, Dao et al. 2022, arXiv 2205.14135); on a CPU, PyTorch's does where the
heads of the values are as wide as those of the keys. With gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) a
block keeps its input, and one block at a time is computed again.
"""

from torch import nn

from lora_core.base.quant import base_weight
from lora_core.budget.parts import Trained, blocks, norms, parts, routers
from lora_core.modules import output_head

FLOAT32 = 4


def kept_bytes_per_token(model: nn.Module, *, compute_bytes: int, trained: Trained) -> int:
    """Return the bytes that a model, or a block of it, keeps for each token; see the module's text.

    Args:
        model: a decoder or a block, on the meta device or any other.
        compute_bytes: of a number in the computation's dtype.
        trained: what is.
    """
    normed = sum(
        norm.width * _norm_bytes(norm.upcast, compute_bytes, trained) for norm in norms(model)
    )
    routed = sum(FLOAT32 * (experts + stream * trained.full) for experts, stream in routers(model))
    return normed + routed + compute_bytes * sum(part.kept(trained) for part in parts(model))


def activation_bytes(
    model: nn.Module, *, tokens: int, compute_bytes: int, trained: Trained, checkpointing: bool
) -> int:
    """Return what is kept for the backward pass of `tokens` tokens, and the gradients in flight through one part.

    Args:
        model: a decoder, on the meta device or any other.
        tokens: that one process handles at once.
        compute_bytes, trained: see `kept_bytes_per_token`.
        checkpointing: blocks keep their input only, and the one that keeps most is computed again.
    """
    kept = kept_bytes_per_token(model, compute_bytes=compute_bytes, trained=trained)
    if checkpointing:
        by_block = [
            kept_bytes_per_token(block, compute_bytes=compute_bytes, trained=trained)
            for block in blocks(model)
        ]
        kept += (
            max(by_block, default=0)
            - sum(by_block)
            + compute_bytes * len(by_block) * _stream(model)
        )
    return tokens * (
        kept + compute_bytes * max((part.in_flight for part in parts(model)), default=0)
    )


def loss_bytes(model: nn.Module, *, rows: int, compute_bytes: int) -> int:
    """Return what the output head holds while it forms the loss of `rows` positions at once.

    Logits and their gradient in float32, and a copy of the gradient where the computation is in another dtype.
    """
    head = output_head(model)
    weight = None if head is None else base_weight(head)
    words = 0 if weight is None else weight.shape[0]
    return rows * words * (2 * FLOAT32 + (compute_bytes if compute_bytes < FLOAT32 else 0))


def _norm_bytes(upcast: bool, compute_bytes: int, trained: Trained) -> int:
    return FLOAT32 + compute_bytes * trained.full if upcast else compute_bytes


def _stream(model: nn.Module) -> int:
    """Return the width of the residual stream: what a block's first part writes."""
    return next((part.writer[0] for block in blocks(model) for part in parts(block)), 0)
