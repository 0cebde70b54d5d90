"""Random initialization of A and B from their shapes: the adapted model initially equals the base.

    kaiming      A uniform with bound 1/√in, as in the reference implementation; B = 0
    gaussian     A normal with standard deviation 1/r, as in the paper and in PEFT; B = 0
    orthogonal   A and B random with B A = 0

Each target has a separate generator, seeded by the run's seed and the target's name. So a name
always gets the same initialization, whatever else is adapted and however many processes there are.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.config import InitMethod
from lora_core.errors import ConfigError


def initial_a(
    rank: int,
    in_features: int,
    method: InitMethod,
    generator: torch.Generator,
) -> Tensor:
    """Return A of shape (rank, in_features) in float32.

    Args:
        rank: rows of A.
        in_features: columns of A.
        method: gaussian, or any other for the uniform distribution of kaiming.
        generator: draws the entries on the CPU.
    """
    a = torch.empty(rank, in_features)
    if method == "gaussian":
        return a.normal_(std=1 / rank, generator=generator)
    bound = 1 / math.sqrt(in_features)
    return a.uniform_(-bound, bound, generator=generator)


def orthogonal(
    rank: int,
    shape: Sequence[int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank), both nonzero and with B A = 0, in float32.

    One half of a random orthonormal basis of ℝʳ spans the columns of A, the other half the rows of
    B. As in PEFT, the weights of the basis vectors are normal, so that an entry has a standard
    deviation of 1/√200 at every rank. Both factors have a gradient from the first step. B A is zero
    up to rounding, below 1e-6 per entry.

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
            f"rank {rank} must be even for orthogonal initialization, half of it for A and half "
            f"for B; use {max(rank, 1) + 1}"
        )
    out_features, in_features = shape
    half = rank // 2
    square = torch.randn(rank, rank, generator=generator)
    basis = torch.linalg.qr(square).Q
    weights_of_a = torch.randn(half, in_features, generator=generator)
    weights_of_b = torch.randn(out_features, half, generator=generator)
    a = basis[:, 0::2] @ weights_of_a / 10
    b = weights_of_b @ basis[:, 1::2].T / 10
    return a, b


def generator_for(name: str, seed: int) -> torch.Generator:
    """Return a generator that depends only on its arguments.

    Args:
        name: of the target.
        seed: of the run.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    first_8_bytes = int.from_bytes(digest[:8], "little")
    return torch.Generator().manual_seed(first_8_bytes >> 1)  # a seed is signed
