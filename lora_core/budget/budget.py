"""What training costs before anything is loaded: trained weights, file size, and one process's memory, term by term.

Works on a model of the meta device, from shapes alone. Every term has a cause that can be pointed at; see `Budget`.

Sources: mixed precision and ZeRO's shares (Rajbhandari et al. 2020, arXiv 1910.02054); NF4 and double quantisation
(Dettmers et al. 2023, arXiv 2305.14314); what DeepSpeed 0.19 allocates, from its runtime/zero; `lora_core.budget.activations`.

Legend: P trained weights, n processes, c bytes of the computation's dtype, h bytes in which a trained weight is held.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lora_core.budget.activations import FLOAT32, activation_bytes, loss_bytes
from lora_core.budget.parts import Trained, blocks, linear_shapes, uncounted
from lora_core.budget.setup import METHODS, Setup
from lora_core.budget.wire import SHARDINGS
from lora_core.errors import ConfigError
from lora_core.modules import output_head
from lora_core.targets import Target

ADAM_MOMENTS = 2
NF4_BYTES = 0.5
"""A code of four bits."""
NF4_SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
"""A byte of scale for each 64 weights, and a float32 for each 256 scales (double quantisation)."""
TENSOR_HEADER = 150
"""Bytes of a safetensors header per tensor, about."""
HEAD_GRADIENTS = 2
"""Where the head is trained, the loss forms its gradient with the logits and scales it into a second one."""
BUCKET_COPIES = 2
"""DeepSpeed's bucket of gradients, and the flat copy of it that is reduced."""
ADAM_TEMPORARIES = 2
"""Numbers that AdamW without a fused kernel forms for each weight: a root and the denominator."""
LIVE_WEIGHTS = 1_000_000_000
"""Stored numbers that ZeRO-3 keeps gathered at most, as DeepSpeed has it where its config does not say."""


@dataclass(frozen=True)
class Budget:
    """The cost of one run; memory in bytes of one process, as if every term were at its height at once.

    It is an upper bound where an allocator gives freed activations to gradients, and what is seen on a CPU, whose heap
    does not give them back.
    """

    trained_weights: int
    """P."""
    file_bytes: int
    """Of the saved adapter in float32, or of the saved model as its weights are held."""
    weight_bytes: int
    """The base, dense or as 4-bit codes, and the trained weights; of float32 masters also the copies in which autocast computes."""
    quantization_bytes: int
    """Scales of the 4-bit codes; they are no parameters, so ZeRO-3 leaves them whole on each process."""
    gradient_bytes: int
    """What the backward pass leaves for the step; DDP holds it a second time in its buckets."""
    optimizer_bytes: int
    """Adam's two moments, and under an engine the float32 masters."""
    activation_bytes: int
    """What the backward pass needs of the forward pass, and the gradients in flight; see `lora_core.budget.activations`."""
    buffer_bytes: int
    """What comes and goes: the larger of what the two passes hold and what the step holds."""
    process_bytes: int
    """As the setup says."""
    host_bytes: int
    """On the host beside it: the optimiser's states and gradients where they are offloaded."""
    loading_bytes: int
    """While the base is loaded: process, weights, and the dense checkpoint where it is mapped beside a 4-bit base."""
    uncounted: tuple[str, ...] = ()
    """Kinds of modules whose activations are in no term, since their shapes don't tell them; with any, the memory is a lower bound."""

    @property
    def memory_bytes(self) -> int:
        """The peak: the sum of the terms in training, or what loading holds where that is more."""
        return max(sum(self.terms().values()), self.loading_bytes)

    def terms(self) -> dict[str, int]:
        """Return the parts of the memory in training by name."""
        others = ("trained_weights", "file_bytes", "host_bytes", "loading_bytes", "uncounted")
        return {name: value for name, value in vars(self).items() if name not in others}


def budget(model: nn.Module, setup: Setup, targets: Sequence[Target] = ()) -> Budget:
    """Return what training `model` costs.

    Args:
        model: without adapters, on the meta device or any other.
        setup: how it is trained.
        targets: the adapters, from `plan_targets`; of no effect on full fine-tuning.

    Raises:
        ConfigError: adapters are to be trained and none are given.
    """
    return _priced(_Sizes.of(model, setup, targets), setup)


def fits(cost: Budget, gpu_bytes: int) -> bool:
    """Tell whether a process fits a device of `gpu_bytes`; a card sold as 24 GB holds 24 × 1024³ bytes.

    Raises:
        ConfigError: what was counted fits, and there is more that could not be counted.
    """
    if cost.memory_bytes <= gpu_bytes and cost.uncounted:
        raise ConfigError(
            f"{cost.memory_bytes:,} bytes fit {gpu_bytes:,}, without the activations of {', '.join(cost.uncounted)}, which shapes don't "
            "tell; measure a step of the model"
        )
    return cost.memory_bytes <= gpu_bytes


def alternatives(
    model: nn.Module, setup: Setup, targets: Sequence[Target], processes: Iterable[int]
) -> list[tuple[Setup, Budget]]:
    """Return the cost of every method under every sharding on each number of processes, all else as in `setup`."""
    counts = list(processes)
    found = []
    for method in METHODS:
        sizes = _Sizes.of(model, replace(setup, method=method), targets)
        ways = [
            replace(setup, method=method, sharding=sharding, processes=count)
            for sharding in SHARDINGS
            for count in counts
        ]
        found += [(way, _priced(sizes, way)) for way in ways]
    return found


@dataclass(frozen=True)
class _Sizes:
    """Weights of a model, counted, and what its passes keep: whatever does not depend on the processes."""

    total: int
    matrices: int
    """In linear layers, the head among them."""
    quantized: int
    """In linear layers but the head, adapted or not, where the method is qlora; stacks of experts stay dense."""
    trained: int
    largest: int
    """The largest linear layer but the head."""
    head: int
    tensors: int
    """That an adapter's file holds."""
    activation_bytes: int
    logits_bytes: int
    uncounted: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, setup: Setup, targets: Sequence[Target]) -> "_Sizes":
        if setup.method != "full" and not targets:
            raise ConfigError(
                f"method {setup.method} trains adapters and there is no target; pass what plan_targets returns"
            )
        total = sum(parameter.numel() for parameter in model.parameters())
        matrices = [out * wide for out, wide in linear_shapes(model)]
        head = output_head(model)
        return cls(
            total=total,
            matrices=sum(matrices)
            + (0 if head is None else sum(parameter.numel() for parameter in head.parameters())),
            quantized=sum(matrices) if setup.method == "qlora" else 0,
            trained=total
            if setup.method == "full"
            else sum(_trained_weights(target, setup) for target in targets),
            largest=max(matrices, default=0),
            head=0 if head is None else sum(parameter.numel() for parameter in head.parameters()),
            tensors=(3 if setup.dora else 2) * len(targets),
            activation_bytes=_activation_bytes(model, setup, targets),
            logits_bytes=loss_bytes(
                model, rows=min(setup.logit_rows, setup.tokens), compute_bytes=setup.compute_bytes
            ),
            uncounted=uncounted(model),
        )


def _priced(sizes: _Sizes, setup: Setup) -> Budget:
    gradient, optimizer = _gradient_bytes(sizes, setup), _optimizer_bytes(sizes, setup)
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
        return int((setup.held_bytes * sizes.total + copies) / setup.shares("zero3"))
    base = setup.compute_bytes * (sizes.total - sizes.quantized) + NF4_BYTES * sizes.quantized
    return int((base + setup.held_bytes * sizes.trained) / setup.shares("zero3"))


def _loading_bytes(sizes: _Sizes, setup: Setup) -> int:
    mapped = (
        setup.compute_bytes * sizes.total
        if setup.mapped_checkpoint and setup.method == "qlora"
        else 0
    )
    return (
        setup.process_bytes
        + _weight_bytes(sizes, setup)
        + int(sizes.quantized * NF4_SCALE_BYTES)
        + mapped
    )


def _gradient_bytes(sizes: _Sizes, setup: Setup) -> int:
    whole = setup.held_bytes * sizes.trained
    if not setup.engine:
        return whole * (2 if setup.processes > 1 else 1)
    return whole // setup.shares("zero2")


def _optimizer_bytes(sizes: _Sizes, setup: Setup) -> int:
    if not setup.engine:
        return int(ADAM_MOMENTS * setup.moment_bytes * sizes.trained)
    return (1 + ADAM_MOMENTS) * FLOAT32 * sizes.trained // setup.processes


def _activation_bytes(model: nn.Module, setup: Setup, targets: Sequence[Target]) -> int:
    full = setup.method == "full"
    stacks = (
        ()
        if full
        else (target.name.rpartition(".")[2] for target in targets if target.layer == "experts")
    )
    trained = Trained(full, frozenset(stacks))
    kept = activation_bytes(
        model,
        tokens=setup.tokens,
        compute_bytes=setup.compute_bytes,
        trained=trained,
        checkpointing=setup.checkpointing,
    )
    if not full:
        beside = sum(_beside(target, setup) for target in targets if target.layer == "linear")
        kept += setup.tokens * beside // (max(1, len(blocks(model))) if setup.checkpointing else 1)
    return int(kept * setup.heap_slack)


def _beside(target: Target, setup: Setup) -> int:
    """Return the bytes that an adapter adds to what a linear layer keeps for a token: a mask, and DoRA's product before it is scaled."""
    return (
        target.in_features * setup.dropout + setup.compute_bytes * target.out_features * setup.dora
    )


def _buffer_bytes(sizes: _Sizes, setup: Setup) -> int:
    """Add up passes and step where a heap with slack keeps the small pieces of adapters; else they share their room."""
    passes, step = sizes.logits_bytes + _pass_bytes(sizes, setup), _step_bytes(sizes, setup)
    if setup.heap_slack > 1 and setup.method != "full":
        return int(setup.heap_slack * (passes + step))
    return max(passes, step)


def _pass_bytes(sizes: _Sizes, setup: Setup) -> int:
    """Return what forward and backward pass hold for a while, logits aside."""
    numbers = sizes.largest if setup.method == "qlora" else 0  # a 4-bit matrix, made dense
    if setup.engine:
        numbers += BUCKET_COPIES * min(setup.bucket_weights, sizes.trained)
    held = setup.compute_bytes * numbers
    if setup.method == "full":
        held += setup.held_bytes * HEAD_GRADIENTS * sizes.head
    if setup.shares_weights:
        held += min(
            _weight_bytes(sizes, replace(setup, sharding="zero2")),
            setup.compute_bytes * LIVE_WEIGHTS,
        )
    return held


def _step_bytes(sizes: _Sizes, setup: Setup) -> int:
    """Return what the optimiser's step holds: an engine lays gradients flat in float32, then lets go of the first ones."""
    if setup.offloads:
        return 0
    updated = (
        sizes.trained // setup.processes if setup.engine else min(sizes.trained, sizes.head)
    )  # DDP: matrix by matrix
    flat = FLOAT32 * updated if setup.engine else 0
    if setup.fused_optimizer:
        return flat
    temporaries = ADAM_TEMPORARIES * FLOAT32 * updated
    return (
        max(flat, flat + temporaries - _gradient_bytes(sizes, setup))
        if setup.engine
        else temporaries
    )
