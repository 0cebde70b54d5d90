"""The product of a linear layer with several adapters, as one autograd function.

    y[i] = x[i] W0ᵀ + bias + s_i · dropout(x[i]) A_iᵀ B_iᵀ        i: the rows of one adapter

It saves only its input for the backward pass, as `lora_core.layers.functional` does for one
adapter, and adds each update to the adapter's rows in place.

Shapes: x (…, I) with the rows along `Rows.dim`, A_i (R_i, I), B_i (O, R_i), y (…, O). N_i is the
number of tokens in the rows of an adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_core.bank.routing import Rows
from lora_core.base.quant import BaseWeight
from lora_core.layers.experts import autocast_dtype
from lora_core.layers.linear import LoraLinear


class _RoutedLinear(NamedTuple):
    """An adapter's linear layer and the rows that it computes."""

    rows: Rows
    layer: LoraLinear


class _FactorsOfRows(NamedTuple):
    """An adapter's factors in the dtype of the product."""

    a: Tensor
    """(R_i, I)"""
    b: Tensor
    """(O, R_i)"""


def mixed_linear(x: Tensor, layers: Sequence[LoraLinear], rows: Sequence[Rows]) -> Tensor:
    """Return the output of the base and of each adapter on its rows.

    Updates beyond s · B A, such as DoRA's, are applied to their rows last.

    Args:
        x: (…, I).
        layers: those of several adapters over one linear module of the base, at least one.
        rows: for each of `layers`, the rows of `x` that it computes.

    Returns:
        (…, O).
    """
    frozen = layers[0].frozen
    dtype = autocast_dtype(x) or frozen.compute_dtype(x)
    bias = _cast_bias(_bias(layers[0].base), dtype)
    extended: list[_RoutedLinear] = []
    updates: list[_RowUpdate] = []
    factors: list[Tensor] = []
    for own, layer in zip(rows, layers, strict=True):
        updates.append(_row_update(own, layer, x))
        factors += layer.factors()
        if not layer.is_plain:
            extended.append(_RoutedLinear(own, layer))
    product_bias = None if extended else bias
    y: Tensor = _MixedLinear.apply(x.to(dtype), frozen, product_bias, updates, *factors)  # type: ignore[no-untyped-call]
    if extended:
        y = _with_extras(y, bias, extended)
    # Under autocast too, bitsandbytes returns its input's dtype.
    return y if frozen.kind == "dense" else y.to(x.dtype)


def _with_extras(y: Tensor, bias: Tensor | None, extended: Sequence[_RoutedLinear]) -> Tensor:
    """Add the bias to `y`, and apply what layers have beyond s · B A to their rows."""
    outputs: list[Tensor] = []
    indices: list[Tensor] = []
    for rows, layer in extended:
        own_bias = _cast_bias(layer.plain_bias, y.dtype)
        output = layer.add_extras(rows.of(y), own_bias)
        outputs.append(output)
        indices.append(rows.indices)
    total = y if bias is None else y + bias
    dim = extended[0].rows.dim
    return total.index_copy(
        dim,
        torch.cat(indices),
        torch.cat(outputs, dim),
    )


@dataclass(frozen=True)
class _RowUpdate:
    """What one adapter does to its rows, without its factors."""

    rows: Rows
    """The adapter's rows of x."""
    scale: float
    """s_i."""
    dropout: float
    """Probability of dropping an input of A; 0 outside training."""
    keep: Tensor | None
    """(N_i, I), which inputs of A are kept, as booleans; None without dropout."""

    def inputs(self, x: Tensor) -> Tensor:
        """Return A's inputs as a matrix (N_i, I)."""
        own = _flat(self.rows.of(x))
        return self.dropped(own)

    def dropped(self, own: Tensor) -> Tensor:
        """Drop entries of a matrix (N_i, I), and scale the rest."""
        if self.keep is None:
            return own
        return own * self.keep / (1 - self.dropout)


def _row_update(rows: Rows, layer: LoraLinear, x: Tensor) -> _RowUpdate:
    """Return an adapter's update for a product with `x`, drawing its dropout mask."""
    dropout = layer.dropout if layer.training else 0.0
    keep = None
    if dropout > 0:
        # Drawn as booleans: x's dtype would round the probability itself.
        mask = torch.empty_like(_flat(rows.of(x)), dtype=torch.bool)
        keep = mask.bernoulli_(1 - dropout)
    return _RowUpdate(rows, layer.scale, dropout, keep)


class _MixedLinear(torch.autograd.Function):
    """The product of all rows, which keeps only its input for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: BaseWeight,
        bias: Tensor | None,
        updates: list[_RowUpdate],
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.base = base
        ctx.updates = updates
        y: Tensor = base.linear(x, bias)
        pairs = _pairs(factors, x.dtype)
        for update, (a, b) in zip(updates, pairs, strict=True):
            down = update.inputs(x) @ a.T
            scaled_b = update.scale * b
            update.rows.add_to(y, down @ scaled_b.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ ctx.base.dense(x.dtype)
        grads: list[Tensor] = []
        pairs = _pairs(factors, x.dtype)
        for update, (a, b) in zip(ctx.updates, pairs, strict=True):
            inputs = update.inputs(x)
            down = (inputs @ a.T) * update.scale
            grad_own = _flat(update.rows.of(grad_y))
            grad_down = (grad_own @ b) * update.scale
            grad_a = grad_down.T @ inputs
            grad_b = grad_own.T @ down
            grads += [grad_a, grad_b]
            if grad_x is not None:
                grad_inputs = update.dropped(grad_down @ a)
                update.rows.add_to(grad_x, grad_inputs)
        return grad_x, None, None, None, *grads


def _pairs(factors: Sequence[Tensor], dtype: torch.dtype) -> list[_FactorsOfRows]:
    """Return each adapter's A and B, cast to `dtype`, from A, B, A, B, …"""
    pairs: list[_FactorsOfRows] = []
    for a, b in zip(factors[::2], factors[1::2], strict=True):
        pair = _FactorsOfRows(a.to(dtype), b.to(dtype))
        pairs.append(pair)
    return pairs


def _bias(base: nn.Module) -> Tensor | None:
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    return bias


def _cast_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _flat(x: Tensor) -> Tensor:
    """Return `x` (…, F) as a matrix with one line per token."""
    features = x.shape[-1]
    return x.reshape(-1, features)
