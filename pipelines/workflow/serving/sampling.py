"""Choose the next token of each answer of a batch: greedy, or sampled with its own seed.

A token depends on the scores of its own answer only. An answer with a seed is therefore the same
whichever requests share its batch, up to rounding of the scores.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

SEED_BITS = 63


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is generated."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample from the likeliest tokens whose probabilities reach this sum."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, which is cut off before them."""
    seed: int | None = None
    """None for a random one."""


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._generator = torch.Generator()
        seed = options.seed
        self._generator.manual_seed(secrets.randbits(SEED_BITS) if seed is None else seed)

    def choose(self, scores: Tensor) -> int:
        """Return the next token.

        Args:
            scores: (V,), unnormalized log-probabilities.
        """
        temperature = self._options.temperature
        if temperature == 0:
            return int(scores.argmax())
        scores = scores.to("cpu", torch.float64)
        # subtracting the maximum first keeps a tiny temperature from overflowing
        scaled = (scores - scores.max()) / temperature
        probabilities, tokens = scaled.softmax(dim=0).sort(descending=True, stable=True)
        before = probabilities.cumsum(dim=0) - probabilities
        kept = torch.where(before < self._options.top_p, probabilities, 0.0)
        drawn = torch.multinomial(kept, 1, generator=self._generator)
        return int(tokens[drawn])


class ChosenTokens(LogitsProcessor):
    """Leaves each row of a batch only the token that its sampler chooses."""

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        self._samplers = samplers

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores (B, V) that are 0 at the chosen tokens and -inf elsewhere."""
        chosen = [sampler.choose(row) for sampler, row in zip(self._samplers, scores, strict=True)]
        columns = torch.tensor(chosen, device=scores.device)[:, None]
        only = torch.full_like(scores, float("-inf"))
        return only.scatter(1, columns, 0.0)  # type: ignore[return-value]
