"""Estimate the cost of training: trained weights, file size, and memory of one process by term.

It needs only shapes, so a model on the meta device is enough. `Budget` documents the terms;
`memory_terms.py` and `activations.py` compute them and name their sources.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import nn

from lora_core.budget.memory_terms import (
    buffer_bytes,
    file_bytes,
    gradient_bytes,
    loading_bytes,
    optimizer_bytes,
    scale_bytes,
    weight_bytes,
)
from lora_core.budget.model_sizes import ModelSizes, measure_sizes
from lora_core.budget.setup import METHODS, Setup
from lora_core.budget.wire import SHARDINGS
from lora_core.errors import ConfigError
from lora_core.targets import Target


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
        in_training = sum(self.terms().values())
        return max(in_training, self.loading_bytes)

    def terms(self) -> dict[str, int]:
        """Return the terms of the memory in training by name."""
        return {
            "weight_bytes": self.weight_bytes,
            "quantization_bytes": self.quantization_bytes,
            "gradient_bytes": self.gradient_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "activation_bytes": self.activation_bytes,
            "buffer_bytes": self.buffer_bytes,
            "process_bytes": self.process_bytes,
        }


def budget(model: nn.Module, setup: Setup, targets: Sequence[Target] = ()) -> Budget:
    """Return the cost of training `model`.

    Args:
        model: without adapters, on the meta device or any other.
        setup: how it is trained.
        targets: the adapters, from `plan_targets`; ignored for full fine-tuning.

    Raises:
        ConfigError: the method trains adapters and there are no targets.
    """
    sizes = measure_sizes(model, setup, targets)
    return _price(sizes, setup)


def fits(cost: Budget, gpu_bytes: int) -> bool:
    """Return whether a process fits a device.

    Args:
        cost: of the training.
        gpu_bytes: memory of the device; a 24 GB card has 24 × 1024³ bytes.

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
    model: nn.Module,
    setup: Setup,
    targets: Sequence[Target],
    processes: Iterable[int],
) -> list[tuple[Setup, Budget]]:
    """Return the cost of `setup` with every method, sharding and number of processes.

    Args:
        model: without adapters, on the meta device or any other.
        setup: how it is trained, apart from these three.
        targets: the adapters, from `plan_targets`; ignored for full fine-tuning.
        processes: the numbers of processes to price.

    Raises:
        ConfigError: there are no targets.
    """
    counts = list(processes)
    priced = []
    for method in METHODS:
        with_method = replace(setup, method=method)
        sizes = measure_sizes(model, with_method, targets)
        for sharding, count in product(SHARDINGS, counts):
            variant = replace(with_method, sharding=sharding, processes=count)
            cost = _price(sizes, variant)
            priced.append((variant, cost))
    return priced


def _price(sizes: ModelSizes, setup: Setup) -> Budget:
    """Return the cost of a model of these sizes under `setup`."""
    gradient = gradient_bytes(sizes, setup)
    optimizer = optimizer_bytes(sizes, setup)
    on_host = 0
    if setup.offloads:
        on_host = gradient + optimizer
        gradient = 0
        optimizer = 0
    return Budget(
        trained_weights=sizes.trained,
        file_bytes=file_bytes(sizes, setup),
        weight_bytes=weight_bytes(sizes, setup),
        quantization_bytes=scale_bytes(sizes),
        gradient_bytes=gradient,
        optimizer_bytes=optimizer,
        activation_bytes=sizes.activation_bytes,
        buffer_bytes=buffer_bytes(sizes, setup),
        process_bytes=setup.process_bytes,
        host_bytes=on_host,
        loading_bytes=loading_bytes(sizes, setup),
        uncounted=sizes.uncounted,
    )
