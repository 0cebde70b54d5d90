"""The output head on the positions that count, in chunks, so that the full table of logits never exists.

A vocabulary of V words costs V logits for each position; where a prompt is masked, all of them are waste. The loss
takes the hidden states of the supervised positions alone and forms the gradient chunk by chunk in the forward pass.

Shapes: hidden (N, D), weight (V, D), targets (N,).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK_ROWS = 256  # 256 × 49,152 logits in float32 are 50 MB


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Return the summed negative log-likelihood of `targets` under the logits hidden · weightᵀ, in nats.

    The gradient reaches `hidden`, and `weight` where it is trained.
    """
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, chunk_rows)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def token_log_likelihoods(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int = CHUNK_ROWS) -> tuple[Tensor, Tensor]:
    """Return, for each position, the log-likelihood of its target in nats (float32) and whether it is the likeliest."""
    likelihoods, greedy = [], []
    for rows, wanted in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True):
        logits = F.linear(rows, weight).float()
        chosen, largest = logits.gather(1, wanted[:, None])[:, 0], logits.amax(dim=1)
        likelihoods.append(chosen - largest - logits.sub_(largest[:, None]).exp_().sum(dim=1).log())  # in place: the table is wide
        greedy.append(chosen >= largest)
    if not likelihoods:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.bool)
    return torch.cat(likelihoods), torch.cat(greedy)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = F.linear(hidden[rows], weight).float()
            wanted = targets[rows, None]
            total += (logits.logsumexp(dim=1) - logits.gather(1, wanted)[:, 0]).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = torch.softmax(logits, dim=1).scatter_add_(1, wanted, wanted.new_full(wanted.shape, -1, dtype=logits.dtype))
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = [None if g is None else g.mul(grad_total.to(g.dtype)) for g in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None, None
