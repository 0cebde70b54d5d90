"""NF4, there and back: a matrix in codes of 4 bits with a scale for each block, as bitsandbytes stores it.

The 16 codes are the quantiles of a normal distribution; a block of 64 weights shares one scale, its largest size. With
double quantisation the scales are themselves stored in 8 bits, around their mean, 256 to a block. FP4 differs in its
codes alone, which are small floating-point numbers.

Source: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), sections 2 and 3. bitsandbytes is imported on first use.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Nf4Settings:
    """What a rounding to 4 bits depends on besides its codes."""

    block_size: int = 64
    """Weights that share a scale."""
    double: bool = True
    """Whether the scales are stored in 8 bits."""


def settings_of(weight: Any) -> Nf4Settings:
    """Return how a 4-bit weight (bitsandbytes' Params4bit) was rounded."""
    return Nf4Settings(weight.quant_state.blocksize, weight.quant_state.nested)


def dequantised(weight: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrix that a 4-bit weight stands for, (out, in).

    It is made in `dtype` straight away, as the base does when it computes: a detour over bfloat16 would lose bits.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy(weight.quant_state)
    state.dtype = dtype
    return dequantize_4bit(weight.data, state)


def requantised(weight: Any, dense: Tensor) -> Any:
    """Return a 4-bit weight with the settings of `weight` and the values of `dense`, (out, in) in float32.

    Neither argument is changed.
    """
    codes, state = _quantised(
        dense, settings_of(weight), weight.quant_state.quant_type, weight.dtype
    )
    state.dtype = weight.quant_state.dtype
    result = copy(weight)
    result.data, result.quant_state = codes, state
    return result


def rounded_to_nf4(dense: Tensor, settings: Nf4Settings) -> Tensor:
    """Return `dense`, (out, in) in float32, as it comes back from NF4."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*_quantised(dense, settings, "nf4", torch.uint8))


def _quantised(
    dense: Tensor, settings: Nf4Settings, codes: str, storage: torch.dtype
) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(
        dense.contiguous(),
        blocksize=settings.block_size,
        compress_statistics=settings.double,
        quant_type=codes,
        quant_storage=storage,
    )
