"""The LoRA product as one autograd function that keeps only its input for the backward pass.

    y = x W0ᵀ + bias + s · (x̃ Aᵀ) Bᵀ        x̃ = dropout(x)

Shapes: x (…, I), W0 (O, I), A (R, I), B (O, R), y (…, O). W0 is frozen: no gradient is formed for it, and an
NF4 weight is made dense again in the backward pass rather than kept. Autograd over two linear layers keeps x, x̃ and
x̃Aᵀ per projection; here q, k and v share one x.

Under autocast the base multiplies as it would alone, and the update in the dtype in which that answers; x is kept as it
came, and A, B and x get their gradients in their own dtypes. Nothing here depends on the device.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), equation 3.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_core.base.quant import BaseWeight


def lora_linear(
    x: Tensor,
    base: BaseWeight,
    bias: Tensor | None,
    update: tuple[Tensor, Tensor, float],
    dropout: float = 0.0,
) -> Tensor:
    """Return x W0ᵀ + bias + s · dropout(x) Aᵀ Bᵀ.

    Args:
        x: (…, I), in the dtype of the computation; under autocast in any.
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


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off in a block, where it is on for the device of `tensor`: there every dtype is chosen by hand."""
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def dense_update(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return s · B A, (O, I) in float32, whatever the dtype of A (R, I) and B (O, R)."""
    with without_autocast(a):
        return scale * (b.float() @ a.float())


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, frozen: tuple[Any, ...]) -> Tensor:
        base, bias, scale, keep, dropout = frozen
        ctx.save_for_backward(x, a, b, keep)
        ctx.base, ctx.scale, ctx.dropout = base, scale, dropout
        y: Tensor = base.linear(x, bias)
        with without_autocast(x):
            down_NR = _rows(_dropped(x.to(y.dtype), keep, dropout)) @ a.to(y.dtype).T
            y.view(-1, y.shape[-1]).addmm_(down_NR, b.to(y.dtype).T, alpha=scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad_y):
            return _gradients(ctx, grad_y)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, A and B, all in the dtype of the product; autograd turns each into that of its tensor."""
    x, a, b, keep = ctx.saved_tensors
    x, a, b = x.to(grad_y.dtype), a.to(grad_y.dtype), b.to(grad_y.dtype)
    x_NI, grad_NO = _rows(_dropped(x, keep, ctx.dropout)), _rows(grad_y)
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
