"""Activation memory: what a training step saves in its forward pass for its backward pass.

It is computed from the shapes of a model's layers:

- A part of a block saves the numbers given by `lora_core.budget.block_parts`, in the computation's
  dtype.
- A norm saves its input, in float32 if it is computed step by step; such a norm also saves what it
  scales if it is trained.
- An adapter adds the mask of its dropout and, under DoRA, each product before its rows are scaled.
  Otherwise `lora_linear` saves only its input, which readers share.
- A router saves the probabilities of all experts in float32 and, if it is trained, its input.

Attention does not save a T × T matrix (FlashAttention, Dao et al. 2022, arXiv 2205.14135); on a
CPU, this holds for PyTorch's attention if value heads are as wide as key heads. With gradient
checkpointing (Chen et al. 2016, arXiv 1604.06174) a block saves its input, and one block at a time
is recomputed.
"""

from torch import nn

from lora_core.base.quant import base_weight
from lora_core.budget.block_parts import TrainedScope
from lora_core.budget.parts import blocks, norms, parts, routers
from lora_core.modules import output_head

FLOAT32 = 4


def saved_bytes_per_token(model: nn.Module, *, compute_bytes: int, trained: TrainedScope) -> int:
    """Return the bytes that a model or a block saves per token; see the module docstring.

    Args:
        model: a decoder or a block, on the meta device or any other.
        compute_bytes: bytes per number in the computation's dtype.
        trained: which weights are trained.
    """
    total = 0
    for norm in norms(model):
        total += norm.width * _norm_bytes(norm.upcast, compute_bytes, trained)
    for router in routers(model):
        saved_input = router.stream if trained.full else 0
        total += FLOAT32 * (router.experts + saved_input)
    for part in parts(model):
        total += compute_bytes * part.saved(trained)
    return total


def activation_bytes(
    model: nn.Module,
    *,
    tokens: int,
    compute_bytes: int,
    trained: TrainedScope,
    checkpointing: bool,
) -> int:
    """Return the bytes saved for the backward pass of `tokens` tokens, plus gradients in flight.

    Gradients in flight are counted for one part, the largest.

    Args:
        model: a decoder, on the meta device or any other.
        tokens: number of tokens that one process handles at once.
        compute_bytes: see `saved_bytes_per_token`.
        trained: see `saved_bytes_per_token`.
        checkpointing: blocks save only their input; the block that saves most is recomputed.
    """
    saved = saved_bytes_per_token(model, compute_bytes=compute_bytes, trained=trained)
    if checkpointing:
        by_block = []
        for block in blocks(model):
            of_block = saved_bytes_per_token(block, compute_bytes=compute_bytes, trained=trained)
            by_block.append(of_block)
        block_inputs = compute_bytes * len(by_block) * _stream_width(model)
        saved += block_inputs
        saved += max(by_block, default=0) - sum(by_block)
    in_flight = max((part.in_flight for part in parts(model)), default=0)
    return tokens * (saved + compute_bytes * in_flight)


def loss_bytes(model: nn.Module, *, rows: int, compute_bytes: int) -> int:
    """Return the bytes that the output head needs to compute the loss of `rows` positions at once.

    These are logits and their gradient in float32, and a copy of the gradient if the computation
    uses another dtype.

    Args:
        model: a decoder, on the meta device or any other.
        rows: number of positions whose logits exist at once.
        compute_bytes: see `saved_bytes_per_token`.
    """
    head = output_head(model)
    weight = None if head is None else base_weight(head)
    vocabulary = 0 if weight is None else weight.shape[0]
    gradient_copy = compute_bytes if compute_bytes < FLOAT32 else 0
    return rows * vocabulary * (2 * FLOAT32 + gradient_copy)


def _norm_bytes(upcast: bool, compute_bytes: int, trained: TrainedScope) -> int:
    """Return the bytes that a norm saves per number that it reads."""
    if not upcast:
        return compute_bytes
    scaled = compute_bytes if trained.full else 0
    return FLOAT32 + scaled


def _stream_width(model: nn.Module) -> int:
    """Return the width of the residual stream: the output of a block's first part."""
    for block in blocks(model):
        for part in parts(block):
            return part.writer.out_features
    return 0
