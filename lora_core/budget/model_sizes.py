"""Numbers of weights of a model and its activation memory: what all distributions of it share."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lora_core.budget.activations import activation_bytes, loss_bytes
from lora_core.budget.block_parts import TrainedScope
from lora_core.budget.parts import blocks, linear_shapes, uncounted
from lora_core.budget.setup import Setup
from lora_core.errors import ConfigError
from lora_core.modules import output_head
from lora_core.targets import Target


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of weights of a model and its activation memory: independent of the processes."""

    total: int
    """All weights of the model, without adapters."""
    matrices: int
    """In linear layers, including the head."""
    quantized: int
    """With qlora: in linear layers except the head, adapted or not; experts stay dense."""
    trained: int
    """Of the model, or of the adapters."""
    largest: int
    """In the largest linear layer except the head."""
    head: int
    """In the output head."""
    tensors: int
    """Number of tensors in an adapter's file."""
    activation_bytes: int
    """See `Budget.activation_bytes`."""
    logits_bytes: int
    """Logits of one chunk of the loss, and their gradient."""
    uncounted: tuple[str, ...]
    """See `Budget.uncounted`."""


def measure_sizes(model: nn.Module, setup: Setup, targets: Sequence[Target]) -> ModelSizes:
    """Return the sizes of `model` under the method of `setup`.

    Args:
        model: without adapters, on the meta device or any other.
        setup: how it is trained; the number of processes and the sharding have no effect.
        targets: the adapters, from `plan_targets`; ignored for full fine-tuning.

    Raises:
        ConfigError: the method trains adapters and there are no targets.
    """
    if setup.method != "full" and not targets:
        raise ConfigError(
            f"method {setup.method} trains adapters and there is no target; "
            "pass the result of plan_targets"
        )
    total = _count_weights(model)
    linear_sizes = [shape.size for shape in linear_shapes(model)]
    in_linears = sum(linear_sizes)
    head_module = output_head(model)
    head = 0 if head_module is None else _count_weights(head_module)
    logit_rows = min(setup.logit_rows, setup.tokens)
    tensors_per_target = 3 if setup.dora else 2
    return ModelSizes(
        total=total,
        matrices=in_linears + head,
        quantized=in_linears if setup.method == "qlora" else 0,
        trained=_trained_weights(total, setup, targets),
        largest=max(linear_sizes, default=0),
        head=head,
        tensors=tensors_per_target * len(targets),
        activation_bytes=_activation_bytes(model, setup, targets),
        logits_bytes=loss_bytes(model, rows=logit_rows, compute_bytes=setup.compute_bytes),
        uncounted=uncounted(model),
    )


def _count_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _trained_weights(total: int, setup: Setup, targets: Sequence[Target]) -> int:
    """Return the number of trained weights of a model with `total` weights."""
    if setup.method == "full":
        return total
    trained = 0
    for target in targets:
        trained += target.trained_weights
        if setup.dora:
            trained += target.out_features
    return trained


def _activation_bytes(model: nn.Module, setup: Setup, targets: Sequence[Target]) -> int:
    """Return the memory of saved activations and gradients in flight in one process."""
    full = setup.method == "full"
    adapted = () if full else targets
    stacks: set[str] = set()
    adapter_bytes_per_token = 0
    for target in adapted:
        if target.layer == "experts":
            stack = target.name.rpartition(".")[2]
            stacks.add(stack)
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
    total = 0
    if setup.dropout:
        total += target.in_features
    if setup.dora:
        total += setup.compute_bytes * target.out_features
    return total
