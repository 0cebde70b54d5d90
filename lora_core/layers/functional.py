"""The LoRA product as one autograd function that keeps only its input for the backward pass.

    y = x W0ᵀ + bias + s · (x̃ Aᵀ) Bᵀ        x̃ = dropout(x)

Shapes: x (…, I), W0 (O, I), A (R, I), B (O, R), y (…, O). W0 is frozen: no gradient is formed for it, and an
NF4 weight is made dense again in the backward pass rather than kept. Autograd over two linear layers keeps x, x̃ and
x̃Aᵀ per projection; here q, k and v share one x.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), equation 3.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_core.base.quant import BaseWeight


def lora_linear(x: Tensor, base: BaseWeight, bias: Tensor | None, update: tuple[Tensor, Tensor, float], dropout: float = 0.0) -> Tensor:
    """Return x W0ᵀ + bias + s · dropout(x) Aᵀ Bᵀ.

    Args:
        x: (…, I), in the dtype of the computation.
        base: the frozen weight, (O, I).
        bias: (O,) or None; frozen.
        update: A (R, I), B (O, R) and the scale s.
        dropout: chance of dropping an input of A; 0 outside training.
    """
    a, b, scale = update
    # drawn as booleans: in x's dtype the chance itself would be rounded
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout > 0 else None
    result: Tensor = _LoraLinear.apply(x, a, b, (base, bias, scale, keep, dropout))  # type: ignore[no-untyped-call]
    return result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, frozen: tuple[Any, ...]) -> Tensor:
        base, bias, scale, keep, dropout = frozen
        ctx.save_for_backward(x, a, b, keep)
        ctx.base, ctx.scale, ctx.dropout = base, scale, dropout
        y: Tensor = base.linear(x, bias)
        down_NR = _rows(_dropped(x, keep, dropout)) @ a.to(x.dtype).T
        y.view(-1, y.shape[-1]).addmm_(down_NR, b.to(x.dtype).T, alpha=scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, keep = ctx.saved_tensors
        x_NI = _rows(_dropped(x, keep, ctx.dropout))
        a, b = a.to(x.dtype), b.to(x.dtype)
        grad_NO = _rows(grad_y)
        grad_down_NR = (grad_NO @ b) * ctx.scale
        grad_a = grad_down_NR.T @ x_NI
        grad_b = grad_NO.T @ ((x_NI @ a.T) * ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x_NI = grad_NO @ ctx.base.dense(x.dtype)
            if keep is None:
                grad_x_NI.addmm_(grad_down_NR, a)
            else:
                grad_x_NI += _dropped(grad_down_NR @ a, _rows(keep), ctx.dropout)
            grad_x = grad_x_NI.view_as(x)
        return grad_x, grad_a, grad_b, None


def _dropped(x: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    return x if keep is None else x * keep / (1 - dropout)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
