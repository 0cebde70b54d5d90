"""Starts of both A and B that are taken from a weight instead of drawn.

`pissa` and `olora` take a part of the weight out of the base and train that. Here the base is never changed: the layer
keeps the start (A0, B0) frozen beside the trained pair and computes

    y = x W0ᵀ + s · (x Aᵀ Bᵀ − x A0ᵀ B0ᵀ)

which is the base at step 0 and has at every step, up to rounding, the value and gradients of an adapter over a base of
W0 − s · B0 A0. A base in 4 bits stays as it is stored, and one base serves every adapter. `plain_pair` writes the
difference as one adapter of the unchanged base.

`residual_start` is the other way round: it is there to change what the model computes at step 0, from a base rounded to
4 bits towards the base before the rounding, so nothing is subtracted from it and it is saved as it is.

Shapes: weight (out, in), A (r, in), B (out, r); all factors are float32. The start belongs into the checkpoint of a
run: another machine may return other signs, with the same product.

Sources: PiSSA (Meng et al. 2024, arXiv 2404.02948); OLoRA (Büyükakyüz 2024, arXiv 2406.01775); LoftQ (Li et al. 2023,
arXiv 2310.08659).
"""

import torch
from torch import Tensor

from lora_core.decomposition import check_rank, decompose, decompose_leading
from lora_core.errors import ConfigError

Pair = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r)."""


def is_spectral(method: str) -> bool:
    """Tell whether a config's init_lora_weights starts from the weight."""
    return method == "olora" or method.startswith("pissa")


def spectral_start(
    weight: Tensor, size: tuple[int, float], method: str, generator: torch.Generator
) -> Pair:
    """Return the start that a config's init_lora_weights names.

    Args:
        weight: the frozen weight, (out, in).
        size: rank and scale of the layer.
        method: olora, pissa or pissa_niter_N.
        generator: draws what an approximate method draws.
    """
    rank, scale = size
    if method == "olora":
        return olora(weight, rank)
    steps = method.removeprefix("pissa").removeprefix("_niter_")
    return pissa(weight, rank, scale, iterations=int(steps) if steps else None, generator=generator)


@torch.no_grad()
def pissa(
    weight: Tensor,
    rank: int,
    scale: float,
    *,
    iterations: int | None = None,
    generator: torch.Generator,
) -> Pair:
    """Return the start of PiSSA: scale · B A is the best approximation of `weight` of that rank, and ‖A‖ = ‖B‖.

    Args:
        weight: the frozen weight, (out, in); not changed.
        rank: at most the smaller side.
        scale: the layer's factor of B·A.
        iterations: find the directions by so many subspace iterations; all of them exactly unless given.
        generator: draws the start of those iterations; an exact decomposition draws nothing.

    Raises:
        ConfigError: the rank or the iterations break their rule, or the weight is not finite.
    """
    check_rank(weight, rank)
    svd = (
        decompose(weight)
        if iterations is None
        else decompose_leading(weight, rank, iterations, generator)
    )
    return _stored(*svd.factors(rank, scale))


@torch.no_grad()
def olora(weight: Tensor, rank: int) -> Pair:
    """Return the start of OLoRA: from W = QR, B is the first columns of Q (orthonormal) and A the first rows of R.

    B A is the projection of W onto its own first `rank` columns. As in PEFT the scale is not taken out of the factors:
    the part of the weight that is trained is scale · B A.

    Args:
        weight: the frozen weight, (out, in); not changed.
        rank: at most the smaller side.

    Raises:
        ConfigError: the rank breaks its rule, or the weight is not finite.
    """
    check_rank(weight, rank)
    q, r = torch.linalg.qr(weight.double())
    return _stored(q[:, :rank], r[:rank])


@torch.no_grad()
def residual_start(original: Tensor, stored: Tensor, rank: int, scale: float) -> Pair:
    """Return the A and B that bring a rounded weight closest to what it was: scale · B A ≈ original − stored.

    This is LoftQ with the rounded weight held fixed, its first iteration; what remains is the tail of the singular
    values of the rounding error. LoftQ goes on to round the weight anew, which would be another base.

    Args:
        original: the weight before it was rounded, (out, in).
        stored: the weight that the 4-bit codes stand for, (out, in).
        rank: at most the smaller side.
        scale: the layer's factor of B·A.

    Raises:
        ConfigError: the weights are of different shapes, equal or not finite, or the rank breaks its rule.
    """
    if original.shape != stored.shape:
        raise ConfigError(
            f"the weights are {tuple(original.shape)} and {tuple(stored.shape)}; give one weight before and after it was rounded"
        )
    residual = original.double() - stored.double()
    check_rank(residual, rank)
    if not residual.any():
        raise ConfigError(
            "the stored weight is the original, so there is no rounding to make up for; start with 'kaiming'"
        )
    return _stored(*decompose(residual).factors(rank, scale))


def plain_pair(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Pair:
    """Return one pair of twice the rank whose product is B A − B0 A0: an adapter of the unchanged base.

    It acts at the same scale. An adapter's file says alpha: the doubled rank keeps the scale alpha/r with 2 · alpha,
    and alpha/√r under rsLoRA with √2 · alpha.

    Args:
        a: trained, (r, in).
        b: trained, (out, r).
        a0: where `a` started, (r, in).
        b0: where `b` started, (out, r).

    Returns:
        A' (2r, in) and B' (out, 2r).
    """
    return torch.cat([a, a0]), torch.cat([b, -b0], dim=1)


def _stored(b: Tensor, a: Tensor) -> Pair:
    """Return the pair as a layer holds it; decompositions come column by column."""
    return a.float().contiguous(), b.float().contiguous()
