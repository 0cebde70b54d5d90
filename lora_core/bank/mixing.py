"""Several adapters at work in one pass: each row of a batch, or stretch of a pack, has an adapter of its own.

    y[i] = x[i] W0ᵀ + bias + s_i · dropout(x[i]) A_iᵀ B_iᵀ        i: the rows of one adapter

The product with the frozen weight is formed once for all rows, and a 4-bit weight made dense once; what is each
adapter's own is formed on its rows alone. So the gradient of an adapter is the one it would get from its rows by
itself, and several can be trained together (mLoRA, Ye et al. 2023, arXiv 2312.02515; LoRAFusion, arXiv 2510.00206).

Shapes: x (…, I) with the rows along `Routing.dim`, A_i (R_i, I), B_i (O, R_i), y (…, O).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_core.bank.routing import Routing, Rows
from lora_core.layers.experts import LoraExperts, autocast_dtype
from lora_core.layers.linear import LoraLinear


def mixed(base: nn.Module, layers: Mapping[str, nn.Module], route: Routing) -> nn.Module:
    """Return the module of the base with the updates that several adapters, by name, have there."""
    kind = (
        MixedExperts if any(isinstance(layer, LoraExperts) for layer in layers.values()) else Mixed
    )
    return kind(base, layers, route)


class Mixed(nn.Module):
    """One module of the base with several adapters' updates over it, each on its own rows."""

    def __init__(self, base: nn.Module, layers: Mapping[str, nn.Module], route: Routing) -> None:
        super().__init__()
        self.base = base
        self.layers = nn.ModuleList(layers.values())
        self.names = tuple(layers)
        self.route = route

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """Let each adapter that has an update here answer on its rows, and the base on the others."""
        self.route.check_features(x) if x.is_floating_point() else self.route.check(x)
        rows = [self.route.rows(name, x.device) for name in self.names]
        linear = [layer for layer in self.layers if isinstance(layer, LoraLinear)]
        if len(linear) == len(self.layers):
            return _mixed_linear(x, linear, rows)
        y: Tensor = self.base(x, *arguments)
        for layer, own in zip(self.layers, rows, strict=True):
            y = y.index_copy(own.dim, own.places, layer(own.of(x), *arguments).to(y.dtype))
        return y


class MixedExperts(nn.Module):
    """The experts of one module with several adapters' updates over them, each on the tokens of its own rows.

    Tokens share no product here: an expert answers to each alone, so the stacks are read by each adapter for its tokens.
    Experts see the tokens of all rows laid flat, and cannot tell a batch of other rows: `check_rows` asks the module around them.
    """

    def __init__(self, base: nn.Module, layers: Mapping[str, nn.Module], route: Routing) -> None:
        super().__init__()
        self.base = base
        self.layers = nn.ModuleList(layers.values())
        self.names = tuple(layers)
        self.route = route

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return (N, H): what each token's experts answer, updated by the adapter of its row."""
        count, device = len(hidden_states), hidden_states.device
        owned = [self.route.tokens(name, count, device) for name in self.names]
        free = torch.ones(count, dtype=torch.bool, device=device)
        free[torch.cat(owned)] = False
        shares = [(free.nonzero()[:, 0], self.base), *zip(owned, self.layers, strict=True)]
        answers = [
            expert(hidden_states[own], top_k_index[own], top_k_weights[own])
            for own, expert in shares
            if len(own)
        ]
        order = torch.cat([own for own, _ in shares])
        return torch.cat(answers)[order.argsort()] if answers else torch.zeros_like(hidden_states)

    def check_rows(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Hold the input of the module around the experts against the routing; a forward pre-hook."""
        self.route.check_features(
            next(value for value in (*arguments, *options.values()) if isinstance(value, Tensor))
        )


def _mixed_linear(x: Tensor, layers: list[LoraLinear], rows: list[Rows]) -> Tensor:
    """Return (…, O); what an adapter has beyond s · B A, such as DoRA's lengths, is put on its rows of the common product."""
    first, bias = layers[0], _bias(layers[0].base)
    dtype = autocast_dtype(x) or first.frozen.compute_dtype(x)
    apart = [(own, layer) for own, layer in zip(rows, layers, strict=True) if not layer.is_plain]
    parts = [_part(own, layer, x) for own, layer in zip(rows, layers, strict=True)]
    factors = [factor for layer in layers for factor in layer.factors()]
    bias = None if bias is None else bias.to(dtype)
    inside = None if apart else bias
    y: Tensor = _MixedLinear.apply(x.to(dtype), (first.frozen, inside, parts), *factors)  # type: ignore[no-untyped-call]
    if apart:
        y = _finished(y, bias, apart)
    return (
        y if first.frozen.kind == "dense" else y.to(x.dtype)
    )  # bitsandbytes answers in its input's dtype under autocast too


def _finished(y: Tensor, bias: Tensor | None, apart: Sequence[tuple[Rows, LoraLinear]]) -> Tensor:
    own = [
        layer.finished(rows.of(y), None if layer.bias is None else layer.bias.to(y.dtype))
        for rows, layer in apart
    ]
    whole, dim = y if bias is None else y + bias, apart[0][0].dim
    return whole.index_copy(dim, torch.cat([rows.places for rows, _ in apart]), torch.cat(own, dim))


@dataclass(frozen=True)
class _Part:
    """What one adapter does to its rows, the factors aside."""

    rows: Rows
    scale: float
    dropout: float
    keep: Tensor | None
    """Which inputs of A are kept, as booleans; None where none is dropped."""

    def inputs(self, x: Tensor) -> Tensor:
        """Return A's inputs as a matrix (N_i, I)."""
        return self.dropped(_flat(self.rows.of(x)))

    def dropped(self, own: Tensor) -> Tensor:
        """Drop entries of a matrix (N_i, I), and scale what is kept."""
        return own if self.keep is None else own * self.keep / (1 - self.dropout)


def _part(rows: Rows, layer: LoraLinear, x: Tensor) -> _Part:
    """Return an adapter's part in a product with `x`, its inputs drawn where some are dropped."""
    dropout = layer.dropout if layer.training else 0.0
    # drawn as booleans: in x's dtype the chance itself would be rounded
    keep = (
        torch.empty_like(_flat(rows.of(x)), dtype=torch.bool).bernoulli_(1 - dropout)
        if dropout > 0
        else None
    )
    return _Part(rows, layer.scale, dropout, keep)


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: tuple[Any, ...], *factors: Tensor) -> Tensor:
        base, bias, parts = frozen
        ctx.save_for_backward(x, *factors)
        ctx.base, ctx.parts = base, parts
        y: Tensor = base.linear(x, bias)
        for part, a, b in zip(parts, factors[::2], factors[1::2], strict=True):
            part.rows.add_to(y, (part.inputs(x) @ a.to(x.dtype).T) @ (part.scale * b.to(x.dtype)).T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        grad_x = grad_y @ ctx.base.dense(x.dtype) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for part, a, b in zip(ctx.parts, factors[::2], factors[1::2], strict=True):
            grad_own, inputs = _flat(part.rows.of(grad_y)), part.inputs(x)
            grad_down = (grad_own @ b.to(x.dtype)) * part.scale
            grads += [grad_down.T @ inputs, grad_own.T @ ((inputs @ a.to(x.dtype).T) * part.scale)]
            if grad_x is not None:
                part.rows.add_to(grad_x, part.dropped(grad_down @ a.to(x.dtype)))
        return grad_x, None, *grads


def _bias(base: nn.Module) -> Tensor | None:
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    return bias


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
