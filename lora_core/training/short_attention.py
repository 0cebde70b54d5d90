"""Causal attention over a short example on a CPU, whose products with probabilities are in 16 bits.

PyTorch's kernels of a CPU never store the scores, so their backward pass computes them again, and
none of them multiplies 16 bits fast. An example of L tokens has H · L² probabilities: while L is
small, they take less memory than what the kernels save, and the backward pass is four products.

    S = s Q Kᵀ,  P = softmax(S),  O = P V        in float32, except for P V
    dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ∘ (dP − rowsum(P ∘ dP)),  dQ = s dS K,  dK = s dSᵀ Q

Scores stay in float32, since rounding them would change probabilities by several percent.

Shapes: q (1, H, L, E), k (1, K, L, E), v and the result (1, K or H, L, V) with H = K · G grouped
heads; inside, R = G · L rows for each of K heads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_core.layers.functional import without_autocast

MIN_TOKENS, MAX_TOKENS = 64, 256
"""Below, PyTorch's kernel is as fast; above, it saves less than the probabilities take."""


def is_short(q: Tensor, v: Tensor) -> bool:
    """Return whether `short_causal` computes this: on a CPU, in 16 bits, a short example."""
    is_transformed: bool = torch._C._are_functorch_transforms_active()
    return (
        q.device.type == "cpu"
        and v.dtype is torch.bfloat16
        and MIN_TOKENS <= q.shape[2] <= MAX_TOKENS
        and not is_transformed
    )


def short_causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Return causal attention, (1, H, L, V) in the dtype of `v`.

    Args:
        q: (1, H, L, E), in any dtype, as k.
        k: (1, K, L, E).
        v: (1, K, L, V), in bfloat16.
        scale: factor of the scores; the default is 1/√E.
    """
    factor = q.shape[3] ** -0.5 if scale is None else scale
    result: Tensor = _ShortCausal.apply(q, k, v, factor)  # type: ignore[no-untyped-call]
    return result


class _ShortCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        _, heads, length, width = q.shape
        keys = k.shape[1]
        with without_autocast(q):
            q_KRE = q.float().mul(scale).reshape(keys, -1, width)
            k_KLE = k[0].float()
            scores_KRL = torch.bmm(q_KRE, k_KLE.transpose(1, 2))
            hidden_LL = torch.full((length, length), -torch.inf).triu(diagonal=1)
            scores_KRL.view(-1, length, length).add_(hidden_LL)
            p_KRL = torch.softmax(scores_KRL, dim=2).to(v.dtype)
            out_KRV = torch.bmm(p_KRL, v[0])
        ctx.scale = scale
        ctx.save_for_backward(q_KRE.to(v.dtype), k_KLE.to(v.dtype), v, p_KRL)
        return out_KRV.view(1, heads, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_KRE, k_KLE, v, p_KRL = ctx.saved_tensors
        keys, _, width = q_KRE.shape
        _, heads, length, _ = grad.shape
        with without_autocast(grad):
            grad_KRV = grad.to(v.dtype).reshape(keys, -1, grad.shape[3])
            grad_v_KLV = torch.bmm(p_KRL.transpose(1, 2), grad_KRV)
            grad_p_KRL = torch.bmm(grad_KRV, v[0].transpose(1, 2))
            p_float = p_KRL.float()
            weighted = grad_p_KRL.float().mul_(p_float)  # a product of two dtypes is slow
            total_KR1 = weighted.sum(dim=2, keepdim=True)
            grad_s_KRL = weighted.addcmul_(p_float, total_KR1, value=-1).to(v.dtype)
            grad_q_KRE = torch.bmm(grad_s_KRL, k_KLE).mul_(ctx.scale)
            grad_k_KLE = torch.bmm(grad_s_KRL.transpose(1, 2), q_KRE)
        return grad_q_KRE.view(1, heads, length, width), grad_k_KLE[None], grad_v_KLV[None], None
