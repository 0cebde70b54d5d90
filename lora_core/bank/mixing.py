"""Several adapters in one pass: each row of a batch, or segment of a pack, has its own adapter.

    y[i] = x[i] W0ᵀ + bias + s_i · dropout(x[i]) A_iᵀ B_iᵀ        i: the rows of one adapter

The product with the frozen weight is computed once for all rows, and a 4-bit weight is dequantized
once; each adapter's update is computed on its rows alone. Therefore an adapter gets the gradient
that its rows alone would give, and several adapters can be trained together (mLoRA, Ye et al. 2023,
arXiv 2312.02515; LoRAFusion, arXiv 2510.00206).

Shapes: x (…, I) with the rows along `Routing.dim`, A_i (R_i, I), B_i (O, R_i), y (…, O).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_core.bank.routing import Routing, Rows
from lora_core.base.quant import BaseWeight, has_custom_forward
from lora_core.layers.experts import LoraExperts, autocast_dtype
from lora_core.layers.linear import LoraLinear


def mixed(base: nn.Module, layers: Mapping[str, nn.Module], route: Routing) -> nn.Module:
    """Return the base module combined with the updates of several adapters, by adapter name."""
    if any(isinstance(layer, LoraExperts) for layer in layers.values()):
        return MixedExperts(base, layers, route)
    return Mixed(base, layers, route)


class Mixed(nn.Module):
    """One module of the base with several adapters' updates, each on its own rows."""

    def __init__(self, base: nn.Module, layers: Mapping[str, nn.Module], route: Routing) -> None:
        super().__init__()
        self.base = base
        self.layers = nn.ModuleList(layers.values())
        self.names = tuple(layers)
        self.route = route

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """Compute each adapter's rows with its update, and all other rows with the base."""
        if x.is_floating_point():
            self.route.check_features(x)
        else:
            self.route.check(x)
        rows = [self.route.rows(name, x.device) for name in self.names]
        linear = [layer for layer in self.layers if isinstance(layer, LoraLinear)]
        if len(linear) == len(self.layers) and not has_custom_forward(self.base):
            return _mixed_linear(x, linear, rows)
        y: Tensor = self.base(x, *arguments)
        for layer, own in zip(self.layers, rows, strict=True):
            updated = layer(own.of(x), *arguments)
            y = y.index_copy(own.dim, own.indices, updated.to(y.dtype))
        return y


class MixedExperts(nn.Module):
    """The experts of one module with several adapters' updates, each on the tokens of its rows.

    Tokens share no product here: each adapter reads the stacks for its own tokens. Experts see the
    flattened tokens of all rows and cannot detect a batch with other rows, so `check_rows` checks
    the input of the enclosing module.
    """

    def __init__(self, base: nn.Module, layers: Mapping[str, nn.Module], route: Routing) -> None:
        super().__init__()
        self.base = base
        self.layers = nn.ModuleList(layers.values())
        self.names = tuple(layers)
        self.route = route

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return (N, H): each token's expert output, updated by the adapter of its row."""
        count = len(hidden_states)
        device = hidden_states.device
        owned = [self.route.tokens(name, count, device) for name in self.names]
        is_free = torch.ones(count, dtype=torch.bool, device=device)
        is_free[torch.cat(owned)] = False
        indices = [is_free.nonzero()[:, 0], *owned]
        outputs: list[Tensor] = []
        for own, experts in zip(indices, [self.base, *self.layers], strict=True):
            if len(own):
                outputs.append(experts(hidden_states[own], top_k_index[own], top_k_weights[own]))
        if not outputs:
            return torch.zeros_like(hidden_states)
        return torch.cat(outputs)[torch.cat(indices).argsort()]

    def check_rows(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Check the input of the enclosing module against the routing; a forward pre-hook."""
        values = (*arguments, *options.values())
        x = next(value for value in values if isinstance(value, Tensor))
        self.route.check_features(x)


def _mixed_linear(x: Tensor, layers: list[LoraLinear], rows: list[Rows]) -> Tensor:
    """Return (…, O); updates beyond s · B A, such as DoRA's, are applied to their rows last."""
    frozen = layers[0].frozen
    bias = _bias(layers[0].base)
    dtype = autocast_dtype(x) or frozen.compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    extended: list[tuple[Rows, LoraLinear]] = []
    updates: list[_RowUpdate] = []
    factors: list[Tensor] = []
    for own, layer in zip(rows, layers, strict=True):
        updates.append(_row_update(own, layer, x))
        factors += layer.factors()
        if not layer.is_plain:
            extended.append((own, layer))
    product_bias = None if extended else bias
    y: Tensor = _MixedLinear.apply(x.to(dtype), frozen, product_bias, updates, *factors)  # type: ignore[no-untyped-call]
    if extended:
        y = _with_extras(y, bias, extended)
    # Under autocast too, bitsandbytes returns its input's dtype.
    return y if frozen.kind == "dense" else y.to(x.dtype)


def _with_extras(
    y: Tensor, bias: Tensor | None, extended: Sequence[tuple[Rows, LoraLinear]]
) -> Tensor:
    """Add the bias to `y`, and apply what layers have beyond s · B A to their rows."""
    outputs: list[Tensor] = []
    indices: list[Tensor] = []
    for rows, layer in extended:
        own_bias = None if layer.plain_bias is None else layer.plain_bias.to(y.dtype)
        outputs.append(layer.add_extras(rows.of(y), own_bias))
        indices.append(rows.indices)
    total = y if bias is None else y + bias
    dim = extended[0][0].dim
    return total.index_copy(dim, torch.cat(indices), torch.cat(outputs, dim))


@dataclass(frozen=True)
class _RowUpdate:
    """What one adapter does to its rows, without its factors."""

    rows: Rows
    scale: float
    dropout: float
    keep: Tensor | None
    """Which inputs of A are kept, as booleans; None without dropout."""

    def inputs(self, x: Tensor) -> Tensor:
        """Return A's inputs as a matrix (N_i, I)."""
        return self.dropped(_flat(self.rows.of(x)))

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
        keep = torch.empty_like(_flat(rows.of(x)), dtype=torch.bool).bernoulli_(1 - dropout)
    return _RowUpdate(rows, layer.scale, dropout, keep)


class _MixedLinear(torch.autograd.Function):
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
        for update, (a, b) in zip(updates, _pairs(factors, x.dtype), strict=True):
            down = update.inputs(x) @ a.T
            update.rows.add_to(y, down @ (update.scale * b).T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        grad_x = grad_y @ ctx.base.dense(x.dtype) if ctx.needs_input_grad[0] else None
        grads: list[Tensor] = []
        for update, (a, b) in zip(ctx.updates, _pairs(factors, x.dtype), strict=True):
            inputs = update.inputs(x)
            down = (inputs @ a.T) * update.scale
            grad_own = _flat(update.rows.of(grad_y))
            grad_down = (grad_own @ b) * update.scale
            grad_a = grad_down.T @ inputs
            grad_b = grad_own.T @ down
            grads += [grad_a, grad_b]
            if grad_x is not None:
                update.rows.add_to(grad_x, update.dropped(grad_down @ a))
        return grad_x, None, None, None, *grads


def _pairs(factors: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return each adapter's A and B, cast to `dtype`, from A, B, A, B, …"""
    cast = [factor.to(dtype) for factor in factors]
    return list(zip(cast[::2], cast[1::2], strict=True))


def _bias(base: nn.Module) -> Tensor | None:
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    return bias


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
