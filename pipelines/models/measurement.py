"""Measure losses and gradients of a few packs with one reader, and compare two measurements.

loss          mean negative log-likelihood of each example, nats per token
gradient      of the summed loss, in a few trained tensors: ‖g − g*‖ / ‖g*‖; there the mean loss
              of the complete pack is compared
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipelines.models.forward import PackReader
from pipelines.models.packs import Pack
from pipelines.models.tolerances import Tolerance

HEAD_ROWS = 128
SMALL_TENSOR = 1 << 20
"""Elements of a gradient that is always kept for the comparison."""
LARGEST_TENSOR = 1 << 24
"""Elements of the largest gradient that may be kept."""
LARGEST_TOTAL = 1 << 26
"""Elements of all gradients that are kept."""


@dataclass(frozen=True)
class Probe:
    """A pack that is measured with both readers."""

    pack: Pack
    gradient: bool = False
    """Compare the gradient of its loss as well."""


@dataclass(frozen=True)
class Measurement:
    """The losses and gradients of a probe, measured with one reader."""

    losses: list[float]
    """Mean negative log-likelihood of each example."""
    gradients: list[Tensor | None]
    has_gradients: bool = False

    def select(self, indices: Sequence[int]) -> "Measurement":
        """Return the same losses with the gradients of some tensors."""
        return Measurement(self.losses, [self.gradients[index] for index in indices])


@dataclass(frozen=True)
class Difference:
    """The largest differences between two lists of measurements."""

    loss: float
    gradient: float

    def is_within(self, tolerance: Tolerance) -> bool:
        """Return whether rounding explains both differences."""
        return self.loss <= tolerance.loss and self.gradient <= tolerance.gradient


def measure(reader: PackReader, probe: Probe, tensors: Sequence[nn.Parameter]) -> Measurement:
    """Read a probe with one reader, in one pass.

    Args:
        reader: how the pack is read.
        probe: a pack, and whether its gradients are measured, too.
        tensors: the trained parameters; their gradients are removed afterwards.
    """
    if probe.gradient and tensors:
        loss, gradients = _loss_and_gradients(reader, probe.pack, tensors)
        return Measurement([loss], gradients, has_gradients=True)
    with torch.no_grad():
        likelihoods, _ = reader.log_likelihoods(probe.pack, HEAD_ROWS)
    losses = []
    for path in probe.pack.paths():
        log_likelihood = likelihoods[path.rows].mean()
        losses.append(-float(log_likelihood))
    return Measurement(losses, [None] * len(tensors))


class _GradientCollector:
    """Takes each gradient as soon as it is computed, so that not all exist at the same time."""

    def __init__(self, tensors: Sequence[nn.Parameter]) -> None:
        self.gradients: list[Tensor | None] = [None] * len(tensors)
        self._budget = LARGEST_TOTAL

    def take(self, index: int, parameter: Tensor) -> None:
        """Move the gradient of a parameter here; a large one is replaced by an empty tensor."""
        gradient = parameter.grad
        assert gradient is not None, "the hook is called after a gradient was accumulated"
        parameter.grad = None
        size = gradient.numel()
        self._budget -= size
        is_kept = size <= SMALL_TENSOR or (size <= LARGEST_TENSOR and self._budget > 0)
        self.gradients[index] = gradient if is_kept else gradient.new_empty(0)


def _loss_and_gradients(
    reader: PackReader, pack: Pack, tensors: Sequence[nn.Parameter]
) -> tuple[float, list[Tensor | None]]:
    """Return the mean loss of a pack and its gradients.

    A gradient is None if the tensor does not affect the loss, and empty if it is too large to keep.
    """
    collector = _GradientCollector(tensors)
    hooks = []
    for index, tensor in enumerate(tensors):
        take = partial(collector.take, index)
        hooks.append(tensor.register_post_accumulate_grad_hook(take))
    try:
        with torch.enable_grad():
            loss = reader.loss(pack)
            torch.autograd.backward(loss, inputs=list(tensors))
    finally:
        for hook in hooks:
            hook.remove()
        for tensor in tensors:
            tensor.grad = None
    return float(loss.detach()) / len(pack.predicts), collector.gradients


def compare(expected: Sequence[Measurement], found: Sequence[Measurement]) -> Difference:
    """Return the largest differences; a value that is not finite differs by infinity.

    Args:
        expected: by the reference, one measurement for each probe.
        found: by another reader, of the same probes and tensors.
    """
    losses: list[float] = []
    gradients: list[float] = []
    for reference, other in zip(expected, found, strict=True):
        pairs_of_losses = zip(reference.losses, other.losses, strict=True)
        losses += [abs(loss - other_loss) for loss, other_loss in pairs_of_losses]
        gradients += map(_relative_distance, reference.gradients, other.gradients)
    return Difference(_largest(losses), _largest(gradients))


def _relative_distance(expected: Tensor | None, found: Tensor | None) -> float:
    if expected is None or not bool(expected.any()):
        return 0.0
    if found is None:
        return math.inf
    distance = (found.float() - expected.float()).norm()
    return float(distance / expected.float().norm())


def _largest(values: Sequence[float]) -> float:
    if any(map(math.isnan, values)):
        return math.inf
    return max(values, default=0.0)
