"""Estimate the cost of training: trained weights, file size, and memory of one process by term.

It needs only shapes, so a model on the meta device is enough. `Budget` documents the terms.

Sources: mixed precision and ZeRO's shards (Rajbhandari et al. 2020, arXiv 1910.02054); NF4 and
double quantization (Dettmers et al. 2023, arXiv 2305.14314); allocations of DeepSpeed 0.19, from
its runtime/zero; `lora_core.budget.activations`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import nn

from lora_core.budget.activations import FLOAT32, activation_bytes, loss_bytes
from lora_core.budget.parts import TrainedScope, blocks, linear_shapes, uncounted
from lora_core.budget.setup import METHODS, Setup
from lora_core.budget.wire import SHARDINGS
from lora_core.errors import ConfigError
from lora_core.modules import output_head
from lora_core.targets import Target

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


@dataclass(frozen=True)
class Budget:
    """The cost of one run; memory is in bytes per process and assumes that all terms peak at once.

    It is an upper bound if the allocator reuses freed activations for gradients. It matches
    measurements on a CPU, whose heap does not return them.
    """

    trained_weights: int
    """Number of trained weights."""
    file_bytes: int
    """Size of the saved adapter in float32, or of the saved model in the dtype of its weights."""
    weight_bytes: int
    """The base, dense or as 4-bit codes, and the trained weights.

    With float32 masters, also the copies that autocast makes.
    """
    quantization_bytes: int
    """Scales of the 4-bit codes; they are not parameters, so ZeRO-3 does not shard them."""
    gradient_bytes: int
    """Gradients of the backward pass; DDP stores them a second time in its buckets."""
    optimizer_bytes: int
    """Adam's two moments and, with an engine, the float32 masters."""
    activation_bytes: int
    """Saved activations and gradients in flight; see `lora_core.budget.activations`."""
    buffer_bytes: int
    """Temporary memory: the larger of that of the two passes and that of the optimizer step."""
    process_bytes: int
    """`Setup.process_bytes`."""
    host_bytes: int
    """Additional memory on the host: offloaded optimizer states and gradients."""
    loading_bytes: int
    """Memory while the base is loaded: process, weights, and a mapped checkpoint."""
    uncounted: tuple[str, ...] = ()
    """Types of modules whose activations cannot be computed from shapes and are in no term.

    If there are any, the memory is a lower bound.
    """

    @property
    def memory_bytes(self) -> int:
        """The peak: the sum of the terms in training, or the memory of loading if larger."""
        return max(sum(self.terms().values()), self.loading_bytes)

    def terms(self) -> dict[str, int]:
        """Return the terms of the memory in training by name."""
        others = ("trained_weights", "file_bytes", "host_bytes", "loading_bytes", "uncounted")
        return {name: value for name, value in vars(self).items() if name not in others}


def budget(model: nn.Module, setup: Setup, targets: Sequence[Target] = ()) -> Budget:
    """Return the cost of training `model`.

    Args:
        model: without adapters, on the meta device or any other.
        setup: how it is trained.
        targets: the adapters, from `plan_targets`; ignored for full fine-tuning.

    Raises:
        ConfigError: the method trains adapters and there are no targets.
    """
    return _price(_measure(model, setup, targets), setup)


def fits(cost: Budget, gpu_bytes: int) -> bool:
    """Return whether a process fits a device of `gpu_bytes`; a 24 GB card has 24 × 1024³ bytes.

    Raises:
        ConfigError: the estimate fits, but it does not include all activations.
    """
    is_within = cost.memory_bytes <= gpu_bytes
    if is_within and cost.uncounted:
        raise ConfigError(
            f"{cost.memory_bytes:,} bytes fit {gpu_bytes:,}, without the activations of "
            f"{', '.join(cost.uncounted)}, which cannot be computed from shapes; "
            "measure a step of the model"
        )
    return is_within


def alternatives(
    model: nn.Module, setup: Setup, targets: Sequence[Target], processes: Iterable[int]
) -> list[tuple[Setup, Budget]]:
    """Return the cost of `setup` with every method, sharding and number of processes."""
    counts = list(processes)
    priced = []
    for method in METHODS:
        sizes = _measure(model, replace(setup, method=method), targets)
        for sharding, count in product(SHARDINGS, counts):
            variant = replace(setup, method=method, sharding=sharding, processes=count)
            priced.append((variant, _price(sizes, variant)))
    return priced


@dataclass(frozen=True)
class _Sizes:
    """Numbers of weights of a model and its activation memory: independent of the processes."""

    total: int
    matrices: int
    """In linear layers, including the head."""
    quantized: int
    """With qlora: in linear layers except the head, adapted or not; experts stay dense."""
    trained: int
    largest: int
    """In the largest linear layer except the head."""
    head: int
    tensors: int
    """Number of tensors in an adapter's file."""
    activation_bytes: int
    logits_bytes: int
    uncounted: tuple[str, ...]


def _measure(model: nn.Module, setup: Setup, targets: Sequence[Target]) -> _Sizes:
    if setup.method != "full" and not targets:
        raise ConfigError(
            f"method {setup.method} trains adapters and there is no target; "
            "pass the result of plan_targets"
        )
    total = _count_weights(model)
    trained = total
    if setup.method != "full":
        trained = sum(_trained_weights(target, setup) for target in targets)
    linear_sizes = [out * width for out, width in linear_shapes(model)]
    head_module = output_head(model)
    head = 0 if head_module is None else _count_weights(head_module)
    logit_rows = min(setup.logit_rows, setup.tokens)
    tensors_per_target = 3 if setup.dora else 2
    return _Sizes(
        total=total,
        matrices=sum(linear_sizes) + head,
        quantized=sum(linear_sizes) if setup.method == "qlora" else 0,
        trained=trained,
        largest=max(linear_sizes, default=0),
        head=head,
        tensors=tensors_per_target * len(targets),
        activation_bytes=_activation_bytes(model, setup, targets),
        logits_bytes=loss_bytes(model, rows=logit_rows, compute_bytes=setup.compute_bytes),
        uncounted=uncounted(model),
    )


def _count_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _price(sizes: _Sizes, setup: Setup) -> Budget:
    gradient = _gradient_bytes(sizes, setup)
    optimizer = _optimizer_bytes(sizes, setup)
    return Budget(
        trained_weights=sizes.trained,
        file_bytes=_file_bytes(sizes, setup),
        weight_bytes=_weight_bytes(sizes, setup),
        quantization_bytes=int(sizes.quantized * NF4_SCALE_BYTES),
        gradient_bytes=0 if setup.offloads else gradient,
        optimizer_bytes=0 if setup.offloads else optimizer,
        activation_bytes=sizes.activation_bytes,
        buffer_bytes=_buffer_bytes(sizes, setup),
        process_bytes=setup.process_bytes,
        host_bytes=gradient + optimizer if setup.offloads else 0,
        loading_bytes=_loading_bytes(sizes, setup),
        uncounted=sizes.uncounted,
    )


def _trained_weights(target: Target, setup: Setup) -> int:
    return target.trained_weights + (target.out_features if setup.dora else 0)


def _file_bytes(sizes: _Sizes, setup: Setup) -> int:
    if setup.method == "full":
        return setup.held_bytes * sizes.trained
    return FLOAT32 * sizes.trained + TENSOR_HEADER * sizes.tensors


def _weight_bytes(sizes: _Sizes, setup: Setup) -> int:
    if setup.method == "full":
        copies = setup.compute_bytes * sizes.matrices if setup.copies else 0
        total: float = setup.held_bytes * sizes.total + copies
    else:
        dense = setup.compute_bytes * (sizes.total - sizes.quantized)
        adapters = setup.held_bytes * sizes.trained
        total = dense + NF4_BYTES * sizes.quantized + adapters
    return int(total / setup.shard_count("zero3"))


def _loading_bytes(sizes: _Sizes, setup: Setup) -> int:
    scales = int(sizes.quantized * NF4_SCALE_BYTES)
    mapped = 0
    if setup.mapped_checkpoint and setup.method == "qlora":
        mapped = setup.compute_bytes * sizes.total
    return setup.process_bytes + _weight_bytes(sizes, setup) + scales + mapped


def _gradient_bytes(sizes: _Sizes, setup: Setup) -> int:
    unsharded = setup.held_bytes * sizes.trained
    if setup.engine:
        return unsharded // setup.shard_count("zero2")
    copies = 2 if setup.processes > 1 else 1  # DDP's buckets
    return unsharded * copies


def _optimizer_bytes(sizes: _Sizes, setup: Setup) -> int:
    if not setup.engine:
        return int(ADAM_MOMENTS * setup.moment_bytes * sizes.trained)
    return (1 + ADAM_MOMENTS) * FLOAT32 * sizes.trained // setup.processes


def _activation_bytes(model: nn.Module, setup: Setup, targets: Sequence[Target]) -> int:
    full = setup.method == "full"
    stacks: set[str] = set()
    adapter_bytes_per_token = 0
    for target in () if full else targets:
        if target.layer == "experts":
            stacks.add(target.name.rpartition(".")[2])
        elif target.layer == "linear":
            adapter_bytes_per_token += _adapter_bytes_per_token(target, setup)
    saved = activation_bytes(
        model,
        tokens=setup.tokens,
        compute_bytes=setup.compute_bytes,
        trained=TrainedScope(full, frozenset(stacks)),
        checkpointing=setup.checkpointing,
    )
    saved_by_adapters = setup.tokens * adapter_bytes_per_token
    if setup.checkpointing:  # of one block at a time
        saved_by_adapters //= max(1, len(blocks(model)))
    return int((saved + saved_by_adapters) * setup.heap_slack)


def _adapter_bytes_per_token(target: Target, setup: Setup) -> int:
    """Return what the adapter of a linear layer saves per token: a mask, and DoRA's product."""
    mask = target.in_features * setup.dropout
    unscaled_product = setup.compute_bytes * target.out_features * setup.dora
    return mask + unscaled_product


def _buffer_bytes(sizes: _Sizes, setup: Setup) -> int:
    """Return the temporary memory of the passes and of the optimizer step.

    They use the same memory, except on a heap with slack, which keeps the small pieces of adapters.
    """
    passes = sizes.logits_bytes + _pass_bytes(sizes, setup)
    step = _step_bytes(sizes, setup)
    if setup.heap_slack > 1 and setup.method != "full":
        return int(setup.heap_slack * (passes + step))
    return max(passes, step)


def _pass_bytes(sizes: _Sizes, setup: Setup) -> int:
    """Return the temporary memory of forward and backward pass, without logits."""
    numbers = sizes.largest if setup.method == "qlora" else 0  # one dequantized matrix
    if setup.engine:
        numbers += BUCKET_COPIES * min(setup.bucket_weights, sizes.trained)
    total = setup.compute_bytes * numbers
    if setup.method == "full":
        total += setup.held_bytes * HEAD_GRADIENTS * sizes.head
    if setup.shards_weights:
        unsharded = _weight_bytes(sizes, replace(setup, sharding="zero2"))
        total += min(unsharded, setup.compute_bytes * LIVE_WEIGHTS)
    return total


def _step_bytes(sizes: _Sizes, setup: Setup) -> int:
    """Return the temporary memory of the optimizer step.

    An engine copies gradients to a flat float32 tensor, then frees the original gradients.
    """
    if setup.offloads:
        return 0
    if not setup.engine:
        # The optimizer updates one matrix at a time.
        updated = min(sizes.trained, sizes.head)
        return 0 if setup.fused_optimizer else ADAM_TEMPORARIES * FLOAT32 * updated
    updated = sizes.trained // setup.processes
    flat = FLOAT32 * updated
    if setup.fused_optimizer:
        return flat
    temporaries = ADAM_TEMPORARIES * FLOAT32 * updated
    return max(flat, flat + temporaries - _gradient_bytes(sizes, setup))
