"""How much two computations of the same loss or gradient may differ by rounding, for each dtype."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """The largest difference that rounding explains."""

    loss: float
    """In nats per token."""
    gradient: float
    """Relative to the gradient norm."""


TOLERANCES = {torch.float32: Tolerance(1e-4, 1e-3)}
IN_16_BITS = Tolerance(2e-2, 1e-1)
PRODUCTS_IN_16_BITS = Tolerance(1e-1, 3e-1)
"""Of products alone, next to float32, and of the gradient of all tensors together."""


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """Return the tolerance for a computation in `dtype`."""
    return TOLERANCES.get(dtype, IN_16_BITS)
