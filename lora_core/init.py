"""How A starts. B starts at zero, so that the adapted model starts as the base.

`kaiming` is the uniform start of the reference implementation, of bound 1/√in; `gaussian` is the paper's, here of
standard deviation 1/r as in PEFT. Each target draws from a generator of its own, seeded by the run's seed and the
target's name: the same A for the same name, whatever else is adapted and on however many processes.
"""

import hashlib
import math

import torch
from torch import Tensor

from lora_core.config import InitMethod


def initial_a(rank: int, in_features: int, method: InitMethod, generator: torch.Generator) -> Tensor:
    """Return A of shape (rank, in_features) in float32."""
    a = torch.empty(rank, in_features)
    if method == "gaussian":
        return a.normal_(std=1 / rank, generator=generator)
    bound = 1 / math.sqrt(in_features)
    return a.uniform_(-bound, bound, generator=generator)


def generator_for(name: str, seed: int) -> torch.Generator:
    """Return a generator whose stream depends on the target's name and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
