"""DoRA: the length of each row of the weight is trained by itself, and LoRA turns the row.

    W' = m ∘ (W0 + s·B A) / ‖W0 + s·B A‖        m (O,) trained; the norm is taken row by row

The norm is formed from its parts, so that neither B A nor the sum is ever built in a step:

    ‖W_i + s·b_i A‖² = ‖W_i‖² + 2 s·b_i (A W_iᵀ) + s²·b_i (A Aᵀ) b_iᵀ

As in the paper's section 4.3 the norm is a constant for the gradient.

Source: DoRA (Liu et al. 2024, arXiv 2402.09353). Shapes: W0 (O, I), A (R, I), B (O, R).
"""

import torch
from torch import Tensor

from lora_core.layers.functional import without_autocast


@torch.no_grad()
def squared_row_norms(weight: Tensor) -> Tensor:
    """Return ‖W_i‖² for each row of an (O, I) weight, in float32."""
    return weight.float().square().sum(dim=1)


@torch.no_grad()
def row_norms(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ‖W_i + s·b_i A‖ for each row, (O,) in float32, without forming the sum.

    A row of zeros has no direction, and its length counts 1: what is divided by it stays zero.

    Args:
        weight: W0, (O, I).
        squared: ‖W_i‖², (O,), which never changes.
        a: (R, I).
        b: (O, R).
        scale: s.
    """
    a, b = a.float(), b.float()
    with without_autocast(a):  # a difference of squares: 8 bits of mantissa would not do
        crossed_OR = weight.float() @ a.T
        both = (b * (2 * scale * crossed_OR + scale**2 * (b @ (a @ a.T)))).sum(dim=1)
    norms = (squared + both).clamp_min(0).sqrt()
    return norms.masked_fill(norms == 0, 1.0)
