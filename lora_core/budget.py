"""What an adapter costs before anything is loaded: trained weights, file size, and the memory of one process.

Works on a model of the meta device. Sizes follow from the shapes; activations are an estimate from the widths of the
linear layers, good for planning and no more exact than that.
"""

from dataclasses import dataclass

from torch import nn

from lora_core.injection import Target
from lora_core.quant import base_weight

FLOAT32 = 4
NF4_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Half a byte of code, a byte of scale per block of 64, and a float for each 256 scales (double quantisation)."""
ADAM_STATES = 2
TENSOR_HEADER = 150
"""Bytes of a safetensors header per tensor, about."""
SAVED_PER_OUTPUT = 1.6
"""Floats kept for the backward pass per output of a linear layer: its result's neighbours in norms and activations."""


@dataclass(frozen=True)
class Budget:
    """The cost of training one adapter, or of full fine-tuning, on one process; in bytes."""

    trained_weights: int
    file_bytes: int
    base_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Sum over weights, gradients, optimiser and activations."""
        return self.base_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def lora_budget(model: nn.Module, targets: list[Target], *, quantized: bool, tokens: int, shards: int) -> Budget:
    """Return the cost of an adapter.

    Args:
        model: on the meta device or any other.
        targets: from `plan_targets`.
        quantized: linear layers but the head, adapted or not, are held in NF4.
        tokens: in one process's part of a step.
        shards: processes that share the optimiser's states and the gradients (ZeRO-2).
    """
    trained = sum(target.trained_weights for target in targets)
    total = sum(parameter.numel() for parameter in model.parameters())
    linear = sum(out * wide for out, wide in _linear_shapes(model))
    base = FLOAT32 * (total - linear) + linear * (NF4_BYTES_PER_WEIGHT if quantized else FLOAT32)
    return Budget(
        trained_weights=trained,
        file_bytes=FLOAT32 * trained + 2 * TENSOR_HEADER * len(targets),
        base_bytes=int(base) + FLOAT32 * trained,
        gradient_bytes=FLOAT32 * trained,
        optimizer_bytes=(ADAM_STATES + 1) * FLOAT32 * trained // shards,
        activation_bytes=_activations(model, tokens),
    )


def full_budget(model: nn.Module, *, tokens: int, shards: int) -> Budget:
    """Return the cost of full fine-tuning; see `lora_budget`."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return Budget(
        trained_weights=total,
        file_bytes=FLOAT32 * total,
        base_bytes=FLOAT32 * total,
        gradient_bytes=FLOAT32 * total,
        optimizer_bytes=(ADAM_STATES + 1) * FLOAT32 * total // shards,
        activation_bytes=_activations(model, tokens),
    )


def _activations(model: nn.Module, tokens: int) -> int:
    widths = sum(sum(shape) for shape in _linear_shapes(model))
    return int(SAVED_PER_OUTPUT * FLOAT32 * tokens * widths / 2)


def _linear_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """Return the shapes of the linear layers, the output head aside."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weights = (base_weight(module) for module in model.modules() if module is not head)
    return [weight.shape for weight in weights if weight is not None]
