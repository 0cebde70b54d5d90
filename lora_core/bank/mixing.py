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

from lora_core.errors import RoutingError
from lora_core.layers.linear import LoraLinear

BATCH, TOKENS = 0, 1
"""Dimensions that rows may lie along: examples of a batch, or tokens of a pack (1, T, …)."""


@dataclass(frozen=True)
class Routing:
    """Which rows belong to which adapter."""

    dim: int
    """BATCH or TOKENS."""
    rows: Mapping[str, Tensor]
    """Adapter → its rows, (n,) of int64; a row that is nobody's is the base's."""
    length: int
    """Rows in all."""

    def check(self, x: Tensor) -> None:
        """Refuse an input that is not laid out as the routing says."""
        if x.shape[self.dim] != self.length:
            raise RoutingError(
                f"the routing names {self.length} rows and dimension {self.dim} of an input of shape {tuple(x.shape)} has "
                f"{x.shape[self.dim]}; name an adapter, or None, for every row"
            )


def routing(names: Sequence[str | None], *, dim: int = BATCH, lengths: Sequence[int] | None = None) -> Routing:
    """Return the routing of rows that bear these names.

    Args:
        names: for each row, or each stretch, its adapter; None is the base alone.
        dim: BATCH or TOKENS.
        lengths: rows in each stretch; one where it is left out.
    """
    spread = [name for name, count in zip(names, lengths or [1] * len(names), strict=True) for _ in range(count)]
    present = dict.fromkeys(name for name in spread if name is not None)
    rows = {name: torch.tensor([place for place, one in enumerate(spread) if one == name]) for name in present}
    return Routing(dim, rows, len(spread))


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
        self.route.check(x)
        rows = [self.route.rows[name].to(x.device) for name in self.names]
        linear = [layer for layer in self.layers if isinstance(layer, LoraLinear) and layer.is_plain]
        if len(linear) == len(self.layers):
            return _mixed_linear(x, linear, rows, self.route.dim)
        y: Tensor = self.base(x, *arguments)
        for layer, own in zip(self.layers, rows, strict=True):
            y = y.index_copy(self.route.dim, own, layer(x.index_select(self.route.dim, own), *arguments).to(y.dtype))
        return y


def _mixed_linear(x: Tensor, layers: list[LoraLinear], rows: list[Tensor], dim: int) -> Tensor:
    first = layers[0]
    dtype = first.frozen.compute_dtype(x)
    parts = [_Part(own, dim, layer.scale, _kept(x.index_select(dim, own), layer)) for own, layer in zip(rows, layers, strict=True)]
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    bias = None if first.bias is None else first.bias.to(dtype)
    y: Tensor = _MixedLinear.apply(x.to(dtype), (first.frozen, bias, parts), *factors)  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


@dataclass(frozen=True)
class _Part:
    """What one adapter does to its rows, the factors aside."""

    rows: Tensor
    dim: int
    scale: float
    keep: Tensor | None
    """Factor of each input of A: 0 where it is dropped."""

    def inputs(self, x: Tensor) -> Tensor:
        """Return A's inputs as a matrix (N_i, I)."""
        own = x.index_select(self.dim, self.rows)
        return _flat(own if self.keep is None else own * self.keep.to(x.dtype))

    def add_to(self, whole: Tensor, own: Tensor) -> None:
        """Add a matrix (N_i, F) to this adapter's rows of `whole`."""
        whole.index_add_(self.dim, self.rows, own.view(*_rows_shape(whole, self.dim, len(self.rows))))


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: tuple[Any, ...], *factors: Tensor) -> Tensor:
        base, bias, parts = frozen
        ctx.save_for_backward(x, *factors)
        ctx.base, ctx.parts = base, parts
        y: Tensor = base.linear(x, bias)
        for part, a, b in zip(parts, factors[::2], factors[1::2], strict=True):
            part.add_to(y, (part.inputs(x) @ a.to(x.dtype).T) @ (part.scale * b.to(x.dtype)).T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        grad_x = grad_y @ ctx.base.dense(x.dtype) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for part, a, b in zip(ctx.parts, factors[::2], factors[1::2], strict=True):
            grad_own, inputs = _flat(grad_y.index_select(part.dim, part.rows)), part.inputs(x)
            grad_down = (grad_own @ b.to(x.dtype)) * part.scale
            grads += [grad_down.T @ inputs, grad_own.T @ ((inputs @ a.to(x.dtype).T) * part.scale)]
            if grad_x is not None:
                own = grad_down @ a.to(x.dtype)
                part.add_to(grad_x, own if part.keep is None else own * _flat(part.keep.to(x.dtype)))
        return grad_x, None, *grads


def _kept(own: Tensor, layer: LoraLinear) -> Tensor | None:
    """Draw which inputs of A are kept; None where none is dropped."""
    if not (layer.training and layer.dropout > 0):
        return None
    return torch.empty_like(own, dtype=torch.float32).bernoulli_(1 - layer.dropout) / (1 - layer.dropout)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _rows_shape(whole: Tensor, dim: int, rows: int) -> list[int]:
    return [rows if place == dim else size for place, size in enumerate(whole.shape)]
