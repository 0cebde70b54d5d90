"""Initialization of A and B from a weight matrix.

`pissa` and `olora` move a part of the weight from the base into the trained factors. This library
never changes the base. Instead, the layer keeps the initial pair (A0, B0) frozen and computes

    y = x W0ᵀ + s · (x Aᵀ Bᵀ − x A0ᵀ B0ᵀ)

At step 0 this equals the base. At every step it has, up to rounding, the value and gradients of an
adapter on the base W0 − s · B0 A0. A 4-bit base keeps its stored codes, and one base serves every
adapter. `plain_pair` writes the difference as one adapter of the unchanged base.

`residual_init` does change what the model computes at step 0: from a 4-bit base towards the base
before quantization. So nothing is subtracted, and the pair is saved without conversion.

Shapes: weight (out, in), A (r, in), B (out, r); all factors are float32. The initial pair belongs
in the checkpoint of a run: another machine may return other signs, with the same product.

Sources: PiSSA (Meng et al. 2024, arXiv 2404.02948); OLoRA (Büyükakyüz 2024, arXiv 2406.01775);
LoftQ (Li et al. 2023, arXiv 2310.08659).
"""

import torch
from torch import Tensor

from lora_core.decomposition import check_rank, decompose, decompose_leading
from lora_core.errors import ConfigError

FactorPair = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r)."""


def is_spectral(method: str) -> bool:
    """Return whether the factors are initialized from the weight.

    Args:
        method: a value of init_lora_weights.
    """
    return method == "olora" or method.startswith("pissa")


def spectral_init(
    weight: Tensor,
    rank: int,
    scale: float,
    method: str,
    generator: torch.Generator,
) -> FactorPair:
    """Return A and B for a value of init_lora_weights.

    Args:
        weight: the frozen weight, (out, in).
        rank: rank of the layer.
        scale: the layer's factor of B·A.
        method: olora, pissa or pissa_niter_N.
        generator: random numbers for approximate methods.

    Raises:
        ConfigError: see `olora` and `pissa`.
    """
    if method == "olora":
        return olora(weight, rank)
    steps = method.removeprefix("pissa").removeprefix("_niter_")
    iterations = int(steps) if steps else None
    return pissa(weight, rank, scale, iterations=iterations, generator=generator)


@torch.no_grad()
def pissa(
    weight: Tensor,
    rank: int,
    scale: float,
    *,
    iterations: int | None = None,
    generator: torch.Generator,
) -> FactorPair:
    """Return the PiSSA pair: scale · B A is the best approximation of `weight`, and ‖A‖ = ‖B‖.

    Args:
        weight: the frozen weight, (out, in); not changed.
        rank: at most the smaller side.
        scale: the layer's factor of B·A.
        iterations: number of subspace iterations; None computes the exact decomposition.
        generator: draws the start of the iterations; the exact decomposition does not use it.

    Raises:
        ConfigError: the rank or the iterations break their rule, or the weight is not finite.
    """
    check_rank(weight, rank)
    if iterations is None:
        svd = decompose(weight)
    else:
        svd = decompose_leading(weight, rank, iterations, generator)
    b, a = svd.factors(rank, scale)
    return _as_stored(a, b)


@torch.no_grad()
def olora(weight: Tensor, rank: int) -> FactorPair:
    """Return the OLoRA pair: with W = QR, B is the first columns of Q and A the first rows of R.

    B A is the projection of W onto its first `rank` columns. As in PEFT, the factors are not
    divided by the scale: the trained part of the weight is scale · B A.

    Args:
        weight: the frozen weight, (out, in); not changed.
        rank: at most the smaller side.

    Raises:
        ConfigError: the rank breaks its rule, or the weight is not finite.
    """
    check_rank(weight, rank)
    q, r = torch.linalg.qr(weight.double())
    return _as_stored(r[:rank], q[:, :rank])


@torch.no_grad()
def residual_init(original: Tensor, stored: Tensor, rank: int, scale: float) -> FactorPair:
    """Return the A and B that best compensate the quantization error.

    scale · B A ≈ original − stored. This is the first iteration of LoftQ, with the quantized weight
    fixed; the remaining error is the tail of the singular values of the quantization error. LoftQ's
    further iterations quantize the weight again, which would be another base.

    Args:
        original: the weight before quantization, (out, in).
        stored: the dequantized weight, (out, in).
        rank: at most the smaller side.
        scale: the layer's factor of B·A.

    Raises:
        ConfigError: the weights differ in shape, are equal or not finite, or the rank breaks its
            rule.
    """
    if original.shape != stored.shape:
        raise ConfigError(
            f"the weights are {tuple(original.shape)} and {tuple(stored.shape)}; "
            "give one weight before and after quantization"
        )
    residual = original.double() - stored.double()
    check_rank(residual, rank)
    if not residual.any():
        raise ConfigError(
            "the stored weight is the original, so the quantization error is zero; use 'kaiming'"
        )
    b, a = decompose(residual).factors(rank, scale)
    return _as_stored(a, b)


def plain_pair(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> FactorPair:
    """Return a pair of rank 2r with the product B A − B0 A0: an adapter of the unchanged base.

    Its scale is the same. An adapter file stores alpha: with the doubled rank, 2 · alpha keeps the
    scale alpha/r, and √2 · alpha keeps the scale alpha/√r of rsLoRA.

    Args:
        a: trained, (r, in).
        b: trained, (out, r).
        a0: initial value of `a`, (r, in).
        b0: initial value of `b`, (out, r).

    Returns:
        A' (2r, in) and B' (out, 2r).
    """
    return torch.cat([a, a0]), torch.cat([b, -b0], dim=1)


def _as_stored(a: Tensor, b: Tensor) -> FactorPair:
    """Return the pair in a layer's format; factors of a decomposition are column-major float64."""
    return a.float().contiguous(), b.float().contiguous()
