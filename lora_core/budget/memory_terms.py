"""The terms of the memory of one process, in bytes, from the sizes of a model and its setup.

Sources: mixed precision and ZeRO's shards (Rajbhandari et al. 2020, arXiv 1910.02054); NF4 and
double quantization (Dettmers et al. 2023, arXiv 2305.14314); allocations of DeepSpeed 0.19, from
its runtime/zero.
"""

from dataclasses import replace

from lora_core.budget.activations import FLOAT32
from lora_core.budget.model_sizes import ModelSizes
from lora_core.budget.setup import Setup

ADAM_MOMENTS = 2
NF4_BYTES = 0.5
"""A 4-bit code."""
NF4_SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
"""One byte of scale per 64 weights, and a float32 per 256 scales (double quantization)."""
TENSOR_HEADER = 150
"""Approximate bytes of a safetensors header per tensor."""
HEAD_GRADIENTS = 2
"""Gradients of a trained head in the loss: one with the logits, and a scaled copy."""
BUCKET_COPIES = 2
"""DeepSpeed's gradient bucket, and the flat copy of it that is reduced."""
ADAM_TEMPORARIES = 2
"""Temporary numbers per weight in AdamW without a fused kernel: a root and the denominator."""
LIVE_WEIGHTS = 1_000_000_000
"""Maximum of stored numbers that ZeRO-3 keeps gathered: DeepSpeed's default."""


def file_bytes(sizes: ModelSizes, setup: Setup) -> int:
    """Return the size of what is saved: the model, or the adapter."""
    if setup.method == "full":
        return setup.held_bytes * sizes.trained
    return FLOAT32 * sizes.trained + TENSOR_HEADER * sizes.tensors


def weight_bytes(sizes: ModelSizes, setup: Setup) -> int:
    """Return the memory of the base and the trained weights in one process."""
    if setup.method == "full":
        total: float = setup.held_bytes * sizes.total
        if setup.copies:
            total += setup.compute_bytes * sizes.matrices
    else:
        dense = setup.compute_bytes * (sizes.total - sizes.quantized)
        codes = NF4_BYTES * sizes.quantized
        adapters = setup.held_bytes * sizes.trained
        total = dense + codes + adapters
    return int(total / setup.shard_count("zero3"))


def scale_bytes(sizes: ModelSizes) -> int:
    """Return the memory of the scales of the 4-bit codes."""
    return int(sizes.quantized * NF4_SCALE_BYTES)


def loading_bytes(sizes: ModelSizes, setup: Setup) -> int:
    """Return the memory while the base is loaded."""
    total = setup.process_bytes
    total += weight_bytes(sizes, setup)
    total += scale_bytes(sizes)
    if setup.mapped_checkpoint and setup.method == "qlora":
        total += setup.compute_bytes * sizes.total
    return total


def gradient_bytes(sizes: ModelSizes, setup: Setup) -> int:
    """Return the memory of the gradients, wherever they are."""
    unsharded = setup.held_bytes * sizes.trained
    if setup.engine:
        return unsharded // setup.shard_count("zero2")
    copies = 2 if setup.processes > 1 else 1  # DDP's buckets
    return unsharded * copies


def optimizer_bytes(sizes: ModelSizes, setup: Setup) -> int:
    """Return the memory of the optimizer's state, wherever it is."""
    if not setup.engine:
        return int(ADAM_MOMENTS * setup.moment_bytes * sizes.trained)
    master_and_moments = 1 + ADAM_MOMENTS
    unsharded = master_and_moments * FLOAT32 * sizes.trained
    return unsharded // setup.processes


def buffer_bytes(sizes: ModelSizes, setup: Setup) -> int:
    """Return the temporary memory of the passes and of the optimizer step.

    They use the same memory, except on a heap with slack, which keeps the small pieces of adapters.
    """
    passes = sizes.logits_bytes + _pass_bytes(sizes, setup)
    step = _step_bytes(sizes, setup)
    if setup.heap_slack > 1 and setup.method != "full":
        return int(setup.heap_slack * (passes + step))
    return max(passes, step)


def _pass_bytes(sizes: ModelSizes, setup: Setup) -> int:
    """Return the temporary memory of forward and backward pass, without logits."""
    numbers = sizes.largest if setup.method == "qlora" else 0  # one dequantized matrix
    if setup.engine:
        bucket = min(setup.bucket_weights, sizes.trained)
        numbers += BUCKET_COPIES * bucket
    total = setup.compute_bytes * numbers
    if setup.method == "full":
        total += setup.held_bytes * HEAD_GRADIENTS * sizes.head
    if setup.shards_weights:
        without_shards = replace(setup, sharding="zero2")
        unsharded = weight_bytes(sizes, without_shards)
        gathered = setup.compute_bytes * LIVE_WEIGHTS
        total += min(unsharded, gathered)
    return total


def _step_bytes(sizes: ModelSizes, setup: Setup) -> int:
    """Return the temporary memory of the optimizer step.

    An engine copies gradients to a flat float32 tensor, then frees the original gradients.
    """
    if setup.offloads:
        return 0
    if not setup.engine:
        if setup.fused_optimizer:
            return 0
        # The optimizer updates one matrix at a time.
        updated = min(sizes.trained, sizes.head)
        return ADAM_TEMPORARIES * FLOAT32 * updated
    updated = sizes.trained // setup.processes
    flat = FLOAT32 * updated
    if setup.fused_optimizer:
        return flat
    temporaries = ADAM_TEMPORARIES * FLOAT32 * updated
    without_gradients = flat + temporaries - gradient_bytes(sizes, setup)
    return max(flat, without_gradients)
