"""What a merge keeps of an update, and how far two models' predictions lie apart.

A merged weight is stored in some dtype, so the change that is realised, M − W, is not quite ΔW:

    fraction        ⟨M − W, ΔW⟩ / ‖ΔW‖²     1: all of the update is there; 0: it was rounded away
    relative error  ‖M − W − ΔW‖ / ‖ΔW‖     the rounding, measured by the update
    relative size   ‖ΔW‖ / ‖W‖              small updates suffer most

W is the weight that was merged into. Under a 4-bit base there are two: the de-quantised weight that the adapter was
trained on, and the original it was rounded from.

Shapes: W, M, ΔW (out, in); logits (…, V). Norms are Frobenius norms, summed in float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lora_core.base.nf4 import Nf4Settings, rounded_to_nf4, settings_of
from lora_core.base.quant import BaseWeight, base_weight
from lora_core.errors import AdapterError
from lora_core.modules import unwrapped
from lora_core.spectrum.updates import read_updates

Storage = Literal["float32", "bfloat16", "float16", "nf4"]
STORAGES: tuple[Storage, ...] = ("float32", "bfloat16", "float16", "nf4")
ROWS_AT_ONCE = 256  # positions whose full table of logits is held in float32


@dataclass(frozen=True)
class Retention:
    """How much of one update a stored weight holds."""

    fraction: float
    relative_error: float
    relative_size: float


@dataclass(frozen=True)
class Fidelity:
    """One way to merge one layer, and what it keeps."""

    layer: str
    base: Literal["original", "dequantised"]
    """The weight that was merged into and that the change is measured from."""
    storage: Storage
    """How the merged weight is stored."""
    kept: Retention


@torch.no_grad()
def kept(delta: Tensor, *, base: Tensor, merged: Tensor) -> Retention:
    """Compare the change from `base` to `merged` with the update `delta`; all (out, in) in float32.

    An update of zero is kept whole where nothing changed. Where the storage could not hold the sum, the fraction is
    not a number and the error is infinite.
    """
    realised = merged - base
    size, error = _norm(delta), _norm(realised - delta)
    if not math.isfinite(error):
        return Retention(math.nan, math.inf, _ratio(size, _norm(base)))
    fraction = float((realised * delta).sum(dtype=torch.float64)) / size**2 if size else 1.0
    return Retention(fraction, _ratio(error, size), _ratio(size, _norm(base)))


@torch.no_grad()
def merge_fidelity(
    model: nn.Module,
    folder: Path,
    *,
    original: nn.Module | None = None,
    storages: tuple[Storage, ...] = STORAGES,
) -> list[Fidelity]:
    """Merge each layer of an adapter aside, into every storage, and report what is kept; no model is changed.

    NF4 is rounded with the settings of the layer, or in blocks of 64 with double quantisation where the layer is dense.
    Merged into an original and stored in NF4, the rounding of the original itself counts as error.

    Args:
        model: the base, dense or quantised, without an adapter.
        folder: the saved adapter.
        original: the dense model that a quantised `model` was rounded from; adds a row for each storage.
        storages: the ways to store the merged weight.

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    rows: list[Fidelity] = []
    for name, update in read_updates(folder).items():
        delta = update.dense()
        bases = _bases(name, delta, model, original)
        settings = next(
            (settings_of(weight.stored) for _, weight in bases if weight.kind == "nf4"),
            Nf4Settings(),
        )
        for kind, weight in bases:
            rows += [
                Fidelity(name, kind, storage, found)
                for storage, found in _ways(weight, delta, storages, settings)
            ]
    return rows


def logit_divergence(logits: Tensor, other_logits: Tensor) -> float:
    """Return the mean over positions of KL(p ‖ q) in nats, where p and q are the softmax of the two.

    Args:
        logits: (…, V), of the model that is taken as the truth.
        other_logits: the same shape, of the model that stands in for it.

    Raises:
        ValueError: the shapes differ, or there is no position.
    """
    if logits.shape != other_logits.shape or not logits.numel():
        raise ValueError(
            f"logits of {tuple(logits.shape)} and {tuple(other_logits.shape)} cannot be compared; "
            "give two tensors of one shape with at least one position"
        )
    rows, others = (
        each.reshape(-1, each.shape[-1]).split(ROWS_AT_ONCE) for each in (logits, other_logits)
    )
    total = sum(_divergences(row, other) for row, other in zip(rows, others, strict=True))
    return total / (logits.numel() // logits.shape[-1])


def _bases(
    name: str, delta: Tensor, model: nn.Module, original: nn.Module | None
) -> list[tuple[Literal["original", "dequantised"], BaseWeight]]:
    own = _weight(name, delta, model)
    found: list[tuple[Literal["original", "dequantised"], BaseWeight]] = [
        ("original" if own.kind == "dense" else "dequantised", own)
    ]
    if original is not None:
        found.append(("original", _weight(name, delta, original)))
    return found


def _weight(name: str, delta: Tensor, model: nn.Module) -> BaseWeight:
    try:
        weight = base_weight(unwrapped(model).get_submodule(name))
    except AttributeError:
        weight = None
    if weight is None:
        raise AdapterError(
            f"the adapter's target {name} is no linear layer of this model; give the base it was trained on"
        )
    if weight.shape != tuple(delta.shape):
        raise AdapterError(
            f"the update of {name} is {tuple(delta.shape)} and the weight {weight.shape}; give the base it was trained on"
        )
    return weight


def _ways(
    weight: BaseWeight, delta: Tensor, storages: tuple[Storage, ...], settings: Nf4Settings
) -> Iterator[tuple[Storage, Retention]]:
    base = weight.dense(torch.float32)
    delta = delta.to(base.device)
    for storage in storages:
        yield storage, kept(delta, base=base, merged=_stored(base + delta, storage, settings))


def _stored(total: Tensor, storage: Storage, settings: Nf4Settings) -> Tensor:
    """Return `total` as it comes back from `storage`, in float32."""
    if storage == "nf4":
        return rounded_to_nf4(total, settings)
    dtype: torch.dtype = getattr(torch, storage)
    return total.to(dtype).float()


def _divergences(logits: Tensor, other_logits: Tensor) -> float:
    """Return the summed KL divergence of the rows, (n, V); a word that is impossible under p adds nothing."""
    log_p, log_q = (torch.log_softmax(each.float(), dim=-1) for each in (logits, other_logits))
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return float(terms.sum(dtype=torch.float64))


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)
