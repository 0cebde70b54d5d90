"""The output head on the positions that count, in chunks, so that the full table of logits never exists.

A vocabulary of V words costs V logits for each position; where a prompt is masked, all of them are waste. The loss
takes the hidden states of the supervised positions alone and forms the gradient chunk by chunk in the forward pass.

    logits = cap · tanh(u / cap),  u = scale · (hidden · weightᵀ + bias)        without a cap: logits = u

Shapes: hidden (N, D), weight (V, D), bias (V,), targets (N,).

Sources: a soft cap on the logits, Gemma 2 (2024, arXiv 2408.00118); a scale, Cohere's and Granite's models.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK_ROWS = 256  # 256 × 49,152 logits in float32 are 50 MB


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the product of its head before it is read as logits."""

    scale: float = 1.0
    """Factor of the product."""
    softcap: float | None = None
    """Bound of the logits; None for none."""

    def apply_(self, product: Tensor) -> Tensor:
        """Turn a product into logits, in place."""
        if self.scale != 1.0:
            product.mul_(self.scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def chain_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient of logits into that of the product, in place; the logits are used up."""
        if self.softcap is not None:
            gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1))
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        return gradient


PLAIN = LogitTransform()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = PLAIN,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Return the summed negative log-likelihood of `targets` under the head's logits, in nats.

    The gradient reaches `hidden`, and `weight` and `bias` where they are trained.
    """
    result: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, targets, bias, _Chunks(transform, chunk_rows)
    )  # type: ignore[no-untyped-call]
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
    """Return, for each position, the log-likelihood of its target in nats (float32) and whether it is the likeliest."""
    parts = [
        target_log_likelihoods(transform.apply_(F.linear(rows, weight, bias).float()), wanted)
        for rows, wanted in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
    ]
    if hidden.shape[0] == 0:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.bool)
    likelihoods, greedy = zip(*parts, strict=True)
    return torch.cat(likelihoods), torch.cat(greedy)


@torch.no_grad()
def target_log_likelihoods(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood of each row's target and whether it is the likeliest; logits (N, V) of float32 are used up."""
    chosen = logits.gather(1, targets[:, None])[:, 0]
    largest = logits.amax(dim=1)
    normalizer = (
        logits.sub_(largest[:, None]).exp_().sum(dim=1).log()
    )  # in place: the table is wide
    return chosen - largest - normalizer, chosen >= largest


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast has products with `x` computed; None where it is off."""
    return (
        torch.get_autocast_dtype(x.device.type)
        if torch.is_autocast_enabled(x.device.type)
        else None
    )


@dataclass(frozen=True)
class _Chunks:
    """How the logits of a chunk are formed, and of how many rows it is."""

    transform: LogitTransform
    rows: int


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        chunks: "_Chunks",
    ) -> Tensor:
        transform, chunk_rows = chunks.transform, chunks.rows
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        dtype = _autocast_dtype(hidden) or hidden.dtype
        head = weight.to(dtype)  # of float32 masters a copy, as autocast would make
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            read = hidden[rows].to(dtype)
            logits = transform.apply_(F.linear(read, head, bias).float())
            wanted = targets[rows, None]
            total += (logits.logsumexp(dim=1) - logits.gather(1, wanted)[:, 0]).sum()
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            gradient = torch.softmax(logits, dim=1).scatter_add_(
                1, wanted, wanted.new_full(wanted.shape, -1, dtype=logits.dtype)
            )
            gradient = transform.chain_(gradient, logits).to(dtype)
            if grad_hidden is not None and dtype == hidden.dtype:
                torch.mm(gradient, head, out=grad_hidden[rows])
            elif grad_hidden is not None:
                grad_hidden[rows] = gradient @ head
            if grad_weight is not None and dtype == weight.dtype:
                grad_weight.addmm_(gradient.T, read)
            elif grad_weight is not None:
                grad_weight += gradient.T @ read
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (
            None if g is None else g.mul(grad_total.to(g.dtype)) for g in ctx.saved_tensors
        )
        return hidden, weight, None, bias, None
