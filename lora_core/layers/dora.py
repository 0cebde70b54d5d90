"""DoRA: the norm of each weight row is a trained magnitude, and LoRA changes the row's direction.

    W' = m ∘ (W0 + s·B A) / ‖W0 + s·B A‖        m (O,) trained; the norm is taken row by row

The norm is computed from its terms, so a step forms neither B A nor the sum:

    ‖W_i + s·b_i A‖² = ‖W_i‖² + 2 s·b_i (A W_iᵀ) + s²·b_i (A Aᵀ) b_iᵀ

As in section 4.3 of the paper, the gradient treats the norm as a constant.

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

    A row of zeros has no direction. Its norm counts as 1, so the quotient stays zero.

    Args:
        weight: W0, (O, I).
        squared: ‖W_i‖², (O,), constant during training.
        a: (R, I).
        b: (O, R).
        scale: s.
    """
    a = a.float()
    b = b.float()
    with without_autocast(a):  # a difference of squares needs more than 8 bits of mantissa
        cross_OR = weight.float() @ a.T
        gram_RR = a @ a.T
        terms_OR = b * (2 * scale * cross_OR + scale**2 * (b @ gram_RR))
        change_O = terms_OR.sum(dim=1)
    norms = (squared + change_O).clamp_min(0).sqrt()
    return norms.masked_fill(norms == 0, 1.0)
