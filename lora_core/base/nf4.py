"""Quantize to NF4 and back, as bitsandbytes stores it: 4-bit codes with a scale per block.

The 16 codes are the quantiles of a normal distribution; a block of 64 weights has one scale, its
largest absolute value. With double quantization the scales themselves are stored in 8 bits, around
their mean, 256 to a block. FP4 differs only in its codes, which are small floating-point numbers.

Source: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), sections 2 and 3. bitsandbytes is imported
on first use.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Nf4Settings:
    """What determines 4-bit quantization in addition to the codes."""

    block_size: int = 64
    """Weights per scale."""
    double: bool = True
    """Whether the scales are stored in 8 bits."""


def settings_of(weight: Any) -> Nf4Settings:
    """Return how a 4-bit weight (bitsandbytes' Params4bit) was quantized."""
    return Nf4Settings(weight.quant_state.blocksize, weight.quant_state.nested)


def dequantized_weight(weight: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrix that a 4-bit weight represents, (out, in).

    It is computed directly in `dtype`, as in the base: going through bfloat16 would lose bits.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy(weight.quant_state)
    state.dtype = dtype
    return dequantize_4bit(weight.data, state)


def requantize(weight: Any, dense: Tensor) -> Any:
    """Return a 4-bit weight with the settings of `weight` and the values of `dense`.

    Neither argument is changed; `dense` is (out, in) in float32.
    """
    quant_type = weight.quant_state.quant_type
    codes, state = _quantize(dense, settings_of(weight), quant_type, weight.dtype)
    state.dtype = weight.quant_state.dtype
    result = copy(weight)
    result.data = codes
    result.quant_state = state
    return result


def round_to_nf4(dense: Tensor, settings: Nf4Settings) -> Tensor:
    """Quantize `dense`, (out, in) in float32, to NF4 and return the dequantized values."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*_quantize(dense, settings, "nf4", torch.uint8))


def _quantize(
    dense: Tensor, settings: Nf4Settings, quant_type: str, storage: torch.dtype
) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(
        dense.contiguous(),
        blocksize=settings.block_size,
        compress_statistics=settings.double,
        quant_type=quant_type,
        quant_storage=storage,
    )
