"""Products in 16 bits on a CPU: the readers are verified in float32, then the rounding is measured.

In 16 bits two correct ways to read an example differ by as much as some mistakes. So the choice
between readers is made where they must agree to five digits, and what is left is one number: how
far the same reader, on the same examples, moves by the products that the training will compute.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_core.base.quant import quantized_kind
from pipelines.errors import BaseModelError
from pipelines.models.equivalence import evaluation_mode, verified_reader
from pipelines.models.forward import PackReader
from pipelines.models.measurement import Measurement, Probe, measure
from pipelines.models.tolerances import PRODUCTS_IN_16_BITS
from pipelines.runtime.interfaces.verified import Rounding, Verified


def verified_with_products(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    *,
    trained: Mapping[str, nn.Parameter],
    products: torch.dtype,
) -> Verified:
    """Return the fastest reader that agrees with the model's own forward, and the rounding.

    Args:
        model: as it will be trained, with states in float32; it is left unchanged.
        probes: packs of the run's own examples.
        trained: the trained parameters, by name.
        products: dtype of the products with weights.

    Raises:
        BaseModelError: see `verified_reader`; or the products change more than rounding explains.
    """
    parameters = list(trained.values())
    with products_in_float32(model):
        reader, verified = verified_reader(model, probes, trained=trained)
        exact = _measurements(model, reader, probes, parameters)
    rounded = replace(reader, products=products)
    rounding = _difference(exact, _measurements(model, rounded, probes, parameters))
    _check_rounding(rounding, products)
    return verified.model_copy(update={"rounding": rounding})


def _check_rounding(rounding: Rounding, products: torch.dtype) -> None:
    tolerance = PRODUCTS_IN_16_BITS
    gradient = 0.0 if rounding.gradient is None else rounding.gradient
    if rounding.loss > tolerance.loss or gradient > tolerance.gradient:
        name = str(products).removeprefix("torch.")
        raise BaseModelError(
            f"products in {name} change the loss of examples by {rounding.loss:.1e} nats per "
            f"token and the gradient by {gradient:.1e} of its norm, of which rounding explains "
            f"{tolerance.loss:g} and {tolerance.gradient:g}; set training.dtype to float32"
        )


@contextmanager
def products_in_float32(model: nn.Module) -> Iterator[None]:
    """Let 4-bit layers multiply in float32 inside a block, whatever they are configured to do."""
    before = {}
    for module in model.modules():
        if quantized_kind(module) in ("nf4", "fp4"):
            before[module] = module.compute_dtype
            module.compute_dtype = torch.float32  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, dtype in before.items():
            module.compute_dtype = dtype


def _measurements(
    model: PreTrainedModel,
    reader: PackReader,
    probes: Sequence[Probe],
    parameters: Sequence[nn.Parameter],
) -> list[Measurement]:
    with evaluation_mode(model):
        return [measure(reader, probe, parameters) for probe in probes]


def _difference(exact: Sequence[Measurement], rounded: Sequence[Measurement]) -> Rounding:
    """Return the mean difference of an example's loss, and that of all gradients together."""
    losses = []
    gradients = []
    for one, other in zip(exact, rounded, strict=True):
        for loss, other_loss in zip(one.losses, other.losses, strict=True):
            losses.append(abs(loss - other_loss))
        distance = _distance(one.gradients, other.gradients)
        if distance is not None:
            gradients.append(distance)
    return Rounding(loss=_finite(fmean(losses)), gradient=max(gradients, default=None))


def _distance(exact: Sequence[Tensor | None], rounded: Sequence[Tensor | None]) -> float | None:
    """Return the norm of the difference of two gradients, relative to the first one's.

    It is None if no gradient was kept: a large one is empty here.
    """
    difference = 0.0
    total = 0.0
    for gradient, other in zip(exact, rounded, strict=True):
        if gradient is None or not gradient.numel():
            continue
        norm = float(gradient.norm())
        total += norm**2
        distance = norm if other is None else float((other - gradient).norm())
        difference += distance**2
    return None if total == 0 else _finite(math.sqrt(difference / total))


def _finite(value: float) -> float:
    return math.inf if math.isnan(value) else value
