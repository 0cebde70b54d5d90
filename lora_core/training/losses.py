"""The output head on the supervised positions, in chunks, so that the full logits never exist.

A vocabulary of V tokens costs V logits per position; for a masked prompt, all of them are waste.
The loss takes the hidden states of the supervised positions alone and computes the gradient chunk
by chunk in the forward pass.

    logits = cap · tanh(u / cap),  u = scale · (hidden · weightᵀ + bias);  without a cap: u

Shapes: hidden (N, D), weight (V, D), bias (V,), targets (N,).

Sources: a soft cap on the logits, Gemma 2 (2024, arXiv 2408.00118); a scale, Cohere's and Granite's
models.
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
    """What a model applies to the output of its head to get logits."""

    scale: float = 1.0
    """Factor of the head's output."""
    softcap: float | None = None
    """Bound of the logits; None for none."""

    def apply_(self, product: Tensor) -> Tensor:
        """Turn the head's output into logits, in place."""
        if self.scale != 1.0:
            product.mul_(self.scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def chain_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient of the logits into that of the head's output, in place.

        This overwrites the logits.
        """
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

    `hidden` gets a gradient, and so do `weight` and `bias` if they are trained.
    """
    chunks = _Chunks(transform, chunk_rows)
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, bias, chunks)  # type: ignore[no-untyped-call]
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

    Log-likelihoods are in nats, in float32.
    """
    likelihoods = [hidden.new_zeros(0, dtype=torch.float32)]
    greedy = [hidden.new_zeros(0, dtype=torch.bool)]
    for start in range(0, hidden.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = transform.apply_(F.linear(hidden[rows], weight, bias).float())
        chunk_likelihoods, chunk_greedy = target_log_likelihoods(logits, targets[rows])
        likelihoods.append(chunk_likelihoods)
        greedy.append(chunk_greedy)
    return torch.cat(likelihoods), torch.cat(greedy)


@torch.no_grad()
def target_log_likelihoods(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return per row the log-likelihood of its target, and whether it is the likeliest.

    This overwrites the logits, (N, V) in float32.
    """
    chosen = logits.gather(1, targets[:, None])[:, 0]
    largest = logits.amax(dim=1)
    # In place: N × V values are large.
    normalizer = logits.sub_(largest[:, None]).exp_().sum(dim=1).log()
    return chosen - largest - normalizer, chosen >= largest


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast computes products with `x`; None if it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@dataclass(frozen=True)
class _Chunks:
    """How the logits of a chunk are formed, and its number of rows."""

    transform: LogitTransform
    rows: int


@dataclass(frozen=True, eq=False)
class _HeadGradients:
    """Gradients that the forward pass accumulates chunk by chunk; None for frozen tensors."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @property
    def needed(self) -> bool:
        return any(each is not None for each in (self.hidden, self.weight, self.bias))

    def add_(self, gradient: Tensor, *, rows: slice, inputs: Tensor, head: Tensor) -> None:
        """Add what one chunk contributes.

        Args:
            gradient: of the head's output, (chunk, V).
            rows: the positions of the chunk.
            inputs: the chunk's hidden states, (chunk, D), in the dtype of `gradient`.
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
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        chunks: _Chunks,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = _HeadGradients(
            hidden=torch.empty_like(hidden) if ctx.needs_input_grad[0] else None,
            weight=torch.zeros_like(weight) if ctx.needs_input_grad[1] else None,
            bias=torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None,
        )
        dtype = _autocast_dtype(hidden) or hidden.dtype
        head = weight.to(dtype)  # copies float32 master weights, as autocast would
        for start in range(0, hidden.shape[0], chunks.rows):
            rows = slice(start, start + chunks.rows)
            inputs = hidden[rows].to(dtype)
            logits = chunks.transform.apply_(F.linear(inputs, head, bias).float())
            labels = targets[rows, None]
            total += (logits.logsumexp(dim=1) - logits.gather(1, labels)[:, 0]).sum()
            if gradients.needed:
                minus_one = labels.new_full(labels.shape, -1, dtype=logits.dtype)
                gradient = torch.softmax(logits, dim=1).scatter_add_(1, labels, minus_one)
                gradient = chunks.transform.chain_(gradient, logits).to(dtype)
                gradients.add_(gradient, rows=rows, inputs=inputs, head=head)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        grad_hidden = _scaled(hidden, grad_total)
        grad_weight = _scaled(weight, grad_total)
        grad_bias = _scaled(bias, grad_total)
        return grad_hidden, grad_weight, None, grad_bias, None


def _scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.mul(factor.to(gradient.dtype))
