"""How A and B start when nothing but their shapes is known, so that the adapted model starts as the base.

B starts at zero, or, orthogonal to A, beside it. `kaiming` is the uniform start of the reference implementation, of
bound 1/√in; `gaussian` is the paper's, here of standard deviation 1/r as in PEFT. Each target draws from a generator of
its own, seeded by the run's seed and the target's name: the same start for the same name, whatever else is adapted and
on however many processes.
"""

import hashlib
import math

import torch
from torch import Tensor

from lora_core.config import InitMethod
from lora_core.errors import ConfigError


def initial_a(
    rank: int, in_features: int, method: InitMethod, generator: torch.Generator
) -> Tensor:
    """Return A of shape (rank, in_features) in float32."""
    a = torch.empty(rank, in_features)
    if method == "gaussian":
        return a.normal_(std=1 / rank, generator=generator)
    bound = 1 / math.sqrt(in_features)
    return a.uniform_(-bound, bound, generator=generator)


def orthogonal(
    rank: int, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank), both other than zero and with B A = 0, in float32.

    The columns of A lie in one half of a random orthonormal basis of ℝʳ and the rows of B in the other; each half is
    weighted with normal draws, as in PEFT, so that an entry has a standard deviation of 1/√200 at every rank. Both
    factors have a gradient from the first step; B A is zero up to its rounding, below 1e-6 an entry.

    Source: datta0.github.io/posts/rethink-lora-init, as in PEFT.

    Args:
        rank: even.
        shape: (out, in) of the weight.
        generator: draws the basis, then A, then B.

    Raises:
        ConfigError: the rank is odd or below 2.
    """
    if rank < 2 or rank % 2:
        raise ConfigError(
            f"rank {rank} must be even for an orthogonal start, half of it for A and half for B; use {max(rank, 1) + 1}"
        )
    out_features, in_features = shape
    basis = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    a = basis[:, 0::2] @ torch.randn(rank // 2, in_features, generator=generator) / 10
    b = torch.randn(out_features, rank // 2, generator=generator) @ basis[:, 1::2].T / 10
    return a, b


def generator_for(name: str, seed: int) -> torch.Generator:
    """Return a generator whose stream depends on the target's name and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
