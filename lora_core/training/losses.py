"""The output head on the supervised positions, in chunks, so that the full logits never exist.

A vocabulary of V tokens costs V logits per position; for a masked prompt, all of them are waste.
The loss takes the hidden states of the supervised positions alone and computes the gradient chunk
by chunk in the forward pass.

    logits = cap · tanh(u / cap),  u = scale · (hidden · weightᵀ + bias);  without a cap: u

Shapes: hidden (N, D), weight (V, D), bias (V,), targets (N,).

Sources: a soft cap on the logits, Gemma 2 (2024, arXiv 2408.00118); a scale, Cohere's and Granite's
models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK_ROWS = 256  # 256 × 49,152 logits in float32 are 50 MB
MIN_ROWS_IN_GRADIENT_DTYPE = 128
"""Fewer positions are not worth a copy of the weight in the dtype of the gradient's product."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model applies to the output of its head to get logits."""

    scale: float = 1.0
    """Factor of the head's output."""
    softcap: float | None = None
    """Bound of the logits; None for none."""

    def apply_(self, product: Tensor) -> Tensor:
        """Turn the head's output into logits, in place.

        Args:
            product: (N, V); overwritten.
        """
        if self.scale != 1.0:
            product.mul_(self.scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def chain_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient of the logits into that of the head's output, in place.

        Args:
            gradient: of the logits, (N, V); overwritten.
            logits: (N, V); overwritten.
        """
        if self.softcap is not None:
            tanh = logits.div_(self.softcap)
            derivative = tanh.square_().neg_().add_(1)
            gradient.mul_(derivative)
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        return gradient


PLAIN = LogitTransform()


@dataclass(frozen=True)
class Chunks:
    """How the positions are divided, so that only a part of the logits exists at once."""

    rows: int = CHUNK_ROWS
    """Positions whose logits exist at once."""
    gradient_dtype: torch.dtype | None = None
    """Dtype of the product that gives the gradient of the hidden states, if there are many
    positions and the head is frozen; None for that of the logits. The loss does not depend on
    it."""

    def dtype_of_gradient(
        self, logits_dtype: torch.dtype, gradients: "_HeadGradients"
    ) -> torch.dtype:
        """Return the dtype in which gradients are computed.

        Args:
            logits_dtype: of the product that gives the logits.
            gradients: those that are needed.
        """
        is_head_trained = gradients.weight is not None or gradients.bias is not None
        if self.gradient_dtype is None or gradients.hidden is None or is_head_trained:
            return logits_dtype
        is_worth_a_copy = len(gradients.hidden) >= MIN_ROWS_IN_GRADIENT_DTYPE
        return self.gradient_dtype if is_worth_a_copy else logits_dtype


DEFAULT_CHUNKS = Chunks()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = PLAIN,
    chunks: Chunks = DEFAULT_CHUNKS,
) -> Tensor:
    """Return the summed negative log-likelihood of `targets` under the head's logits, in nats.

    `hidden` gets a gradient, and so do `weight` and `bias` if they are trained.

    Args:
        hidden: (N, D), hidden states of the supervised positions.
        weight: (V, D), of the head.
        targets: (N,) of int64, token ids.
        bias: (V,), of the head.
        transform: from the head's output to logits.
        chunks: how the positions are divided.

    Returns:
        A scalar in float32.
    """
    how = _Computation(transform, chunks)
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, bias, how)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def token_log_likelihoods(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = PLAIN,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Return per position the log-likelihood of its target, and whether it is the likeliest.

    Args:
        hidden: (N, D), hidden states of the positions.
        weight: (V, D), of the head.
        targets: (N,) of int64, token ids.
        bias: (V,), of the head.
        transform: from the head's output to logits.
        chunk_rows: positions whose logits exist at once.

    Returns:
        Log-likelihoods in nats, (N,) in float32, and (N,) of bool.
    """
    likelihoods = [hidden.new_zeros(0, dtype=torch.float32)]
    greedy = [hidden.new_zeros(0, dtype=torch.bool)]
    for rows in _chunks_of(hidden, chunk_rows):
        logits = F.linear(hidden[rows], weight, bias).float()
        logits = transform.apply_(logits)
        chunk_likelihoods, chunk_greedy = target_log_likelihoods(logits, targets[rows])
        likelihoods.append(chunk_likelihoods)
        greedy.append(chunk_greedy)
    return torch.cat(likelihoods), torch.cat(greedy)


@torch.no_grad()
def target_log_likelihoods(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return per row the log-likelihood of its target, and whether it is the likeliest.

    Args:
        logits: (N, V) in float32; overwritten.
        targets: (N,) of int64, token ids.

    Returns:
        Log-likelihoods in nats, (N,) in float32, and (N,) of bool.
    """
    chosen = logits.gather(1, targets[:, None])[:, 0]
    largest = logits.amax(dim=1)
    # In place: N × V values are large.
    shifted = logits.sub_(largest[:, None])
    normalizer = shifted.exp_().sum(dim=1).log()
    likelihoods = chosen - largest - normalizer
    return likelihoods, chosen >= largest


def _chunks_of(hidden: Tensor, chunk_rows: int) -> Iterator[slice]:
    """Yield consecutive ranges of at most `chunk_rows` of the positions of `hidden` (N, D)."""
    for start in range(0, hidden.shape[0], chunk_rows):
        yield slice(start, start + chunk_rows)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast computes products with `x`; None if it is off."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


@dataclass(frozen=True)
class _Computation:
    """How the logits and their gradient are computed."""

    transform: LogitTransform
    chunks: Chunks


@dataclass(frozen=True, eq=False)
class _HeadGradients:
    """Gradients that the forward pass accumulates chunk by chunk; None for frozen tensors."""

    hidden: Tensor | None
    """(N, D)"""
    weight: Tensor | None
    """(V, D)"""
    bias: Tensor | None
    """(V,)"""

    @property
    def needed(self) -> bool:
        """Whether any tensor is trained."""
        each = (self.hidden, self.weight, self.bias)
        return any(gradient is not None for gradient in each)

    def add_(self, gradient: Tensor, *, rows: slice, inputs: Tensor, head: Tensor) -> None:
        """Add what one chunk contributes.

        Args:
            gradient: of the head's output, (chunk, V).
            rows: the positions of the chunk.
            inputs: the chunk's hidden states, (chunk, D); if the weight is trained, in the dtype of
                `gradient`.
            head: the weight, (V, D), in the dtype of `gradient`.
        """
        if self.hidden is not None:
            if gradient.dtype == self.hidden.dtype:
                torch.mm(gradient, head, out=self.hidden[rows])
            else:
                self.hidden[rows] = gradient @ head
        if self.weight is not None:
            if gradient.dtype == self.weight.dtype:
                self.weight.addmm_(gradient.T, inputs)
            else:
                self.weight.add_(gradient.T @ inputs)
        if self.bias is not None:
            self.bias.add_(gradient.sum(dim=0))


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed loss, whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        how: _Computation,
    ) -> Tensor:
        transform, chunks = how.transform, how.chunks
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = _empty_gradients(ctx, hidden, weight, bias)
        dtype = _autocast_dtype(hidden) or hidden.dtype
        head = weight.to(dtype)  # copies float32 master weights, as autocast would
        gradient_dtype = chunks.dtype_of_gradient(dtype, gradients)
        head_of_gradient = head.to(gradient_dtype) if gradients.needed else head
        for rows in _chunks_of(hidden, chunks.rows):
            inputs = hidden[rows].to(dtype)
            logits = F.linear(inputs, head, bias).float()
            logits = transform.apply_(logits)
            labels = targets[rows, None]
            normalizer = logits.logsumexp(dim=1, keepdim=True)
            total += (normalizer - logits.gather(1, labels)).sum()
            if gradients.needed:
                gradient = _gradient_of_logits(logits, normalizer, labels, transform)
                gradient = transform.chain_(gradient, logits).to(gradient_dtype)
                gradients.add_(gradient, rows=rows, inputs=inputs, head=head_of_gradient)
        ctx.save_for_backward(
            gradients.hidden,
            gradients.weight,
            gradients.bias,
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        grad_hidden = _scaled(hidden, grad_total)
        grad_weight = _scaled(weight, grad_total)
        grad_bias = _scaled(bias, grad_total)
        return grad_hidden, grad_weight, None, grad_bias, None


def _empty_gradients(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> _HeadGradients:
    """Return the gradients to fill, for those inputs of the function that need one."""
    needs_hidden, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
    return _HeadGradients(
        hidden=torch.empty_like(hidden) if needs_hidden else None,
        weight=torch.zeros_like(weight) if needs_weight else None,
        bias=torch.zeros_like(bias) if bias is not None and needs_bias else None,
    )


def _gradient_of_logits(
    logits: Tensor, normalizer: Tensor, labels: Tensor, transform: LogitTransform
) -> Tensor:
    """Return softmax(logits) − one-hot(labels), (n, V).

    Args:
        logits: (n, V); overwritten unless the transform's chain rule needs them.
        normalizer: their logsumexp, (n, 1).
        labels: (n, 1).
        transform: from the head's output to logits.
    """
    minus_one = labels.new_full(labels.shape, -1, dtype=logits.dtype)
    is_needed = transform.softcap is not None
    shifted = logits - normalizer if is_needed else logits.sub_(normalizer)
    return shifted.exp_().scatter_add_(1, labels, minus_one)


def _scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    """Return a gradient times the incoming one, a scalar."""
    if gradient is None:
        return None
    return gradient.mul(factor.to(gradient.dtype))
