"""The value that each parameter of a base gets from a merge, computed without changing the base.

W0 + s·B·A is formed in float32 and rounded once to the dtype of W0. In a 4-bit base, the sum is
quantized again with the settings of the layer. int8 has no such quantization and is refused.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lora_core.base.nf4 import dequantized_weight, requantize
from lora_core.errors import MergeError
from lora_core.layers.linear import LoraLinear
from lora_core.merging.fidelity import Retention, measure_retention

FOUR_BIT = ("nf4", "fp4")
"""Kinds of storage whose sum with an update is quantized again."""


class _NewValue(NamedTuple):
    """A parameter of the base and its value after the merge."""

    path: str
    value: Tensor


def merged_values(parts: Mapping[str, nn.Module], *, force: bool) -> dict[str, Tensor]:
    """Return the new value of every parameter of the base that the adapter changes.

    Args:
        parts: module path → the adapter's part at that path; not changed.
        force: quantize the sums of a 4-bit base again instead of refusing them.

    Returns:
        Parameter path → value: of the parameter's dtype, or 4-bit codes.

    Raises:
        MergeError: the base is quantized and `force` is not set, or a sum does not fit the dtype.
    """
    values: dict[str, Tensor] = {}
    for name, part in parts.items():
        values.update(_values_of_part(name, part, force=force))
    return values


def retained_updates(
    parts: Mapping[str, nn.Module],
    values: Mapping[str, Tensor],
) -> dict[str, Retention]:
    """Return what survived of each update that was rounded to 4 bits.

    Args:
        parts: module path → the adapter's part at that path.
        values: see `merged_values`.

    Returns:
        Module path → measurement; layers that are not 4-bit are absent.
    """
    retention: dict[str, Retention] = {}
    for name, part in parts.items():
        if _is_four_bit(part):
            codes = values[f"{name}.weight"]
            retention[name] = _retention(cast(LoraLinear, part), codes)
    return retention


def base_of(part: nn.Module) -> nn.Module:
    """Return the module of the base that a part of an adapter replaces."""
    base: nn.Module = part.base  # type: ignore[assignment]
    return base


def _values_of_part(name: str, part: nn.Module, *, force: bool) -> Iterator[_NewValue]:
    """Yield the new value of each parameter under one part."""
    for key, value in _dense_tensors(name, part).items():
        dtype = base_of(part).get_parameter(key).dtype
        is_parameter = isinstance(value, nn.Parameter)
        total = value.detach().to(dtype, copy=is_parameter)
        yield _NewValue(f"{name}.{key}", _checked_finite(name, total))
    if _is_four_bit(part):
        codes = _requantized(name, cast(LoraLinear, part), force=force)
        yield _NewValue(f"{name}.weight", codes)


def _dense_tensors(name: str, part: nn.Module) -> dict[str, Tensor]:
    """Return the new values of the base's parameters, except 4-bit codes."""
    if isinstance(part, LoraLinear) and part.frozen.kind == "int8":
        raise MergeError(
            f"{name} is stored in int8, which has no merge without losses; "
            "load the base in full precision and merge there"
        )
    if _is_four_bit(part):
        bias = cast(LoraLinear, part).merged_bias()
        return {} if bias is None else {"bias": bias}
    merged: dict[str, Tensor] = part.merged_tensors()  # type: ignore[operator]
    return merged


def _requantized(name: str, layer: LoraLinear, *, force: bool) -> Tensor:
    """Return the merged weight of a 4-bit layer, quantized again."""
    if not force:
        raise MergeError(
            f"{name} is stored in {layer.frozen.kind}: "
            "rounding to 4 bits would erase most of a small update; "
            "load the base in full precision and merge there, "
            "or pass force=True and look at what was kept"
        )
    base = layer.frozen.dense(torch.float32)
    total = _checked_finite(name, base + layer.delta())
    codes: Tensor = requantize(layer.frozen.stored, total)
    return codes


def _checked_finite(name: str, total: Tensor) -> Tensor:
    if not torch.isfinite(total).all():
        raise MergeError(
            f"{name}: the merged weight is not finite in {total.dtype}; merge in float32"
        )
    return total


def _retention(layer: LoraLinear, codes: Tensor) -> Retention:
    """Compare the change from the dequantized base to the dequantized `codes` with the update."""
    return measure_retention(
        layer.delta(),
        base=layer.frozen.dense(torch.float32),
        merged=dequantized_weight(codes),
    )


def _is_four_bit(part: nn.Module) -> bool:
    return isinstance(part, LoraLinear) and part.frozen.kind in FOUR_BIT
