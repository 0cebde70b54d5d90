"""The LoRA product as one autograd function that saves only its input for the backward pass.

    y = x W0ᵀ + bias + s · (x̃ Aᵀ) Bᵀ        x̃ = dropout(x)

Shapes: x (…, I), W0 (O, I), A (R, I), B (O, R), y (…, O). W0 is frozen: it gets no gradient, and
the backward pass dequantizes an NF4 weight again instead of storing the dense copy. Autograd over
two linear layers saves x, x̃ and x̃Aᵀ per projection; here q, k and v share one x.

Under autocast the base multiplies in the dtype it would use alone, and the update uses the dtype of
that result. x is saved in its original dtype, and A, B and x get gradients in their own dtypes.
Nothing here depends on the device. `gradcheck` and `gradgradcheck` in float64 pass, so gradient
penalties can be trained. (Under DoRA they fail by design; see `dora.py`.) Transforms of
`torch.func`, such as per-sample gradients, compute the same by separate operations.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), equation 3.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.base.quant import BaseWeight


class ScaledFactors(NamedTuple):
    """The update s · B A as its factors."""

    a: Tensor
    """(R, I)"""
    b: Tensor
    """(O, R)"""
    scale: float
    """Factor of B·A."""


@dataclass(frozen=True, eq=False)
class _Constants:
    """The inputs of the product that get no gradient."""

    base: BaseWeight
    dtype: torch.dtype
    bias: Tensor | None
    scale: float
    keep: Tensor | None
    """Dropout mask of x's shape, True where an input is kept; None without dropout."""
    dropout: float


def lora_linear(
    x: Tensor,
    base: BaseWeight,
    *,
    bias: Tensor | None,
    update: ScaledFactors,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x W0ᵀ + bias + s · dropout(x) Aᵀ Bᵀ.

    Args:
        x: (…, I), in any dtype; several layers with the same input save one tensor.
        base: the frozen weight, (O, I).
        bias: (O,) or None; frozen.
        update: A, B and the scale s.
        dropout: probability of dropping an input of A; 0 outside training.
        dtype: of the product; the default is x's. Autocast takes precedence.
    """
    dtype = x.dtype if dtype is None else dtype
    if torch._C._are_functorch_transforms_active():
        return add_update(base.linear(x.to(dtype), bias), x, update, dropout=dropout)
    keep = None
    if dropout > 0:
        # Drawn as booleans: x's dtype would round the probability.
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
    a, b, scale = update
    constants = _Constants(base, dtype, bias, scale, keep, dropout)
    result: Tensor = _LoraLinear.apply(x, a, b, constants)  # type: ignore[no-untyped-call]
    return result


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast in a block if it is on for the device of `tensor`.

    The code inside chooses every dtype explicitly.
    """
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def dense_update(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return s · B A, (O, I) in `dtype`, for any dtype of A (R, I) and B (O, R)."""
    with without_autocast(a):
        return scale * (b.to(dtype) @ a.to(dtype))


def add_update(y: Tensor, x: Tensor, update: ScaledFactors, *, dropout: float = 0.0) -> Tensor:
    """Return y + s · dropout(x) Aᵀ Bᵀ, for a y that the base's own forward has computed.

    `lora_linear` needs less memory, but it computes the base's product itself.

    Args:
        y: (…, O); the update takes its dtype and device.
        x: (…, I), in any dtype.
        update: A, B and the scale s.
        dropout: probability of dropping an input of A; 0 outside training.
    """
    with without_autocast(y):
        down = F.dropout(x.to(y), dropout) @ update.a.to(y).T
        return y + update.scale * (down @ update.b.to(y).T)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, constants: _Constants) -> Tensor:
        keep, dropout = constants.keep, constants.dropout
        ctx.save_for_backward(x, a, b, keep)
        ctx.base = constants.base
        ctx.scale = constants.scale
        ctx.dropout = dropout
        x = x.to(constants.dtype)
        y: Tensor = constants.base.linear(x, constants.bias)
        with without_autocast(x):
            x_NI = _rows(_dropped(x.to(y.dtype), keep, dropout))
            down_NR = x_NI @ a.to(y.dtype).T
            y_NO = y.view(-1, y.shape[-1])
            y_NO.addmm_(down_NR, b.to(y.dtype).T, alpha=constants.scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad_y):
            return _gradients(ctx, grad_y)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, A and B in the dtype of the product; autograd casts each one."""
    x, a, b, keep = ctx.saved_tensors
    dtype = grad_y.dtype
    x = x.to(dtype)
    a = a.to(dtype)
    b = b.to(dtype)
    x_NI = _rows(_dropped(x, keep, ctx.dropout))
    grad_NO = _rows(grad_y)
    grad_down_NR = (grad_NO @ b) * ctx.scale
    grad_a = grad_down_NR.T @ x_NI
    grad_b = grad_NO.T @ ((x_NI @ a.T) * ctx.scale)
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x_NI = grad_NO @ ctx.base.dense(dtype)
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
