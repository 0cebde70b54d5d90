"""How much of an update a merge retains, and how far the predictions of two models diverge.

A merged weight is stored in some dtype, so the realized change, M − W, is not exactly ΔW:

    fraction        ⟨M − W, ΔW⟩ / ‖ΔW‖²     1: the complete update; 0: it was rounded away
    relative error  ‖M − W − ΔW‖ / ‖ΔW‖     the rounding, relative to the update
    relative size   ‖ΔW‖ / ‖W‖              small updates lose most

W is the weight that the update was merged into. Under a 4-bit base there are two: the dequantized
weight that the adapter was trained on, and the original weight before rounding.

Shapes: W, M, ΔW (out, in); logits (…, V). Norms are Frobenius norms, summed in float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lora_core.base.nf4 import Nf4Settings, round_to_nf4, settings_of
from lora_core.base.quant import BaseWeight, base_weight
from lora_core.errors import AdapterError
from lora_core.modules import unwrapped
from lora_core.spectrum.updates import read_updates

Storage = Literal["float32", "bfloat16", "float16", "nf4"]
STORAGES: tuple[Storage, ...] = ("float32", "bfloat16", "float16", "nf4")
Origin = Literal["original", "dequantized"]
ROWS_AT_ONCE = 256  # positions whose logits are converted to float32 at a time


@dataclass(frozen=True)
class Retention:
    """How much of one update a stored weight contains."""

    fraction: float
    """⟨M − W, ΔW⟩ / ‖ΔW‖²: 1 for the complete update, 0 if it was rounded away."""
    relative_error: float
    """‖M − W − ΔW‖ / ‖ΔW‖."""
    relative_size: float
    """‖ΔW‖ / ‖W‖."""


@dataclass(frozen=True)
class Fidelity:
    """One way to merge one layer, and what it retains."""

    layer: str
    base: Origin
    """The weight that the update is merged into; the change is measured from it."""
    storage: Storage
    """How the merged weight is stored."""
    retention: Retention


@torch.no_grad()
def measure_retention(delta: Tensor, *, base: Tensor, merged: Tensor) -> Retention:
    """Compare the change from `base` to `merged` with `delta`.

    A zero update counts as fully retained if nothing changed. If the storage could not represent
    the sum, the fraction is NaN and the error is infinite.

    Args:
        delta: ΔW, (out, in) in float32.
        base: W, the same shape and dtype.
        merged: M as stored, dequantized; the same shape and dtype.
    """
    realized = merged - base
    size = _norm(delta)
    error = _norm(realized - delta)
    relative_size = _ratio(size, _norm(base))
    if not math.isfinite(error):
        return Retention(math.nan, math.inf, relative_size)
    fraction = 1.0
    if size:
        inner_product = (realized * delta).sum(dtype=torch.float64)
        fraction = float(inner_product) / size**2
    relative_error = _ratio(error, size)
    return Retention(fraction, relative_error, relative_size)


@torch.no_grad()
def merge_fidelity(
    model: nn.Module,
    folder: Path,
    *,
    original: nn.Module | None = None,
    storages: tuple[Storage, ...] = STORAGES,
) -> list[Fidelity]:
    """Merge copies of each layer into every storage and report what is retained.

    No model is changed. NF4 rounding uses the settings of the layer, or blocks of 64 with double
    quantization if the layer is dense. For a merge into an original that is stored in NF4, the
    rounding of the original itself counts as error.

    Args:
        model: the base, dense or quantized, without an adapter.
        folder: the saved adapter.
        original: the dense model before `model` was quantized; adds a row per storage.
        storages: the ways to store the merged weight.

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    rows: list[Fidelity] = []
    for name, update in read_updates(folder).items():
        delta = update.dense()
        bases = [_weight(name, delta, model)]
        if original is not None:
            bases.append(_weight(name, delta, original))
        settings = _nf4_settings(bases)
        for index, weight in enumerate(bases):
            is_dense = weight.kind == "dense" or index > 0
            origin: Origin = "original" if is_dense else "dequantized"
            for storage, retention in _retentions(weight, delta, storages, settings):
                rows.append(Fidelity(name, origin, storage, retention))
    return rows


def logit_divergence(logits: Tensor, other_logits: Tensor) -> float:
    """Return the mean over positions of KL(p ‖ q) in nats; p and q are the softmax of the two.

    Args:
        logits: (…, V), of the reference model.
        other_logits: the same shape, of the model that approximates it.

    Raises:
        ValueError: the shapes differ, or there is no position.
    """
    if logits.shape != other_logits.shape or not logits.numel():
        raise ValueError(
            f"logits of {tuple(logits.shape)} and {tuple(other_logits.shape)} cannot be compared; "
            "give two tensors of one shape with at least one position"
        )
    vocabulary = logits.shape[-1]
    chunks = logits.reshape(-1, vocabulary).split(ROWS_AT_ONCE)
    other_chunks = other_logits.reshape(-1, vocabulary).split(ROWS_AT_ONCE)
    total = 0.0
    for chunk, other_chunk in zip(chunks, other_chunks, strict=True):
        total += _divergences(chunk, other_chunk)
    return total / (logits.numel() // vocabulary)


def _nf4_settings(weights: list[BaseWeight]) -> Nf4Settings:
    """Return the settings of the first NF4 weight, or the defaults."""
    for weight in weights:
        if weight.kind == "nf4":
            return settings_of(weight.stored)
    return Nf4Settings()


def _weight(name: str, delta: Tensor, model: nn.Module) -> BaseWeight:
    """Return the weight of the module at `name`, which must have the shape of `delta`."""
    try:
        weight = base_weight(unwrapped(model).get_submodule(name))
    except AttributeError:
        weight = None
    if weight is None:
        raise AdapterError(
            f"the adapter's target {name} is not a linear layer of this model; "
            "give the base it was trained on"
        )
    if weight.shape != tuple(delta.shape):
        raise AdapterError(
            f"the update of {name} is {tuple(delta.shape)} and the weight {weight.shape}; "
            "give the base it was trained on"
        )
    return weight


def _retentions(
    weight: BaseWeight,
    delta: Tensor,
    storages: tuple[Storage, ...],
    settings: Nf4Settings,
) -> Iterator[tuple[Storage, Retention]]:
    """Merge ΔW into `weight` and yield what each storage retains of it."""
    base = weight.dense(torch.float32)
    delta = delta.to(base.device)
    for storage in storages:
        merged = _stored(base + delta, storage, settings)
        retention = measure_retention(delta, base=base, merged=merged)
        yield storage, retention


def _stored(total: Tensor, storage: Storage, settings: Nf4Settings) -> Tensor:
    """Return `total` after a round trip through `storage`, in float32."""
    if storage == "nf4":
        return round_to_nf4(total, settings)
    dtype: torch.dtype = getattr(torch, storage)
    return total.to(dtype).float()


def _divergences(logits: Tensor, other_logits: Tensor) -> float:
    """Return the KL divergence summed over rows, (n, V); a token with p = 0 adds nothing."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    log_q = torch.log_softmax(other_logits.float(), dim=-1)
    p = log_p.exp()
    terms = p * (log_p - log_q)
    terms = torch.where(p > 0, terms, 0.0)
    total = terms.sum(dtype=torch.float64)
    return float(total)


def _norm(x: Tensor) -> float:
    """Return the Frobenius norm, summed in float64."""
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return float(norm)


def _ratio(numerator: float, denominator: float) -> float:
    """Return the quotient; infinite for a nonzero numerator over zero, and 0 for 0/0."""
    if denominator:
        return numerator / denominator
    return math.inf if numerator else 0.0
