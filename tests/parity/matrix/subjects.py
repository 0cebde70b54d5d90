"""What is adapted: a tiny model, its inputs, and the names of its parts that settings refer to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from parity.cases import FLOAT32, Inputs, Tolerance, tokens
from parity.models import Build
from torch import Tensor

BATCH_NORMS = Tolerance(1e-5, 1e-4)
"""A batch norm removes the mean of a gradient, so the rest has a larger relative rounding error.

In float32, the gradients of both libraries differ by up to 2e-5 from those in float64.
"""
TOKENS, LENGTH = 12, 9
"""Few distinct tokens, so that the trained rows occur."""
TOKEN_ROWS = (7, 3)


@dataclass(frozen=True)
class Subject:
    """A model, and what its parts are called; an empty name means that it has no such part."""

    name: str
    kind: str
    """Group in the result, such as decoder."""
    build: Build
    targets: tuple[str, ...]
    """Layers to adapt, by the last part of their paths."""
    regex: str
    """A regular expression that matches the complete paths of some layers."""
    inputs: Inputs = tokens
    excluded: str = ""
    """Complete path of one of the targets."""
    blocks: str = ""
    """What precedes the index of a block; the model has a block 1."""
    embedding: str = ""
    head: str = ""
    """The output head."""
    saved: str = ""
    """A module to train in full."""
    parameters: tuple[str, ...] = ()
    """Weights to adapt by their own names."""
    is_tied: bool = False
    """Whether the head shares the weight of the embedding."""
    task: str = ""
    """PEFT's type of the task, by which it guesses the head of a classifier."""
    peft: Mapping[str, Any] = field(default_factory=dict)
    """Settings that PEFT needs for this model."""
    tolerance: Tolerance = FLOAT32
    is_thorough: bool = False
    """Whether all configurations are tried, not only one of each kind."""


def few_tokens() -> Mapping[str, Tensor]:
    """Return tokens without the padding tokens 0 and 1, the same at every call."""
    return {"input_ids": _drawn_tokens(5)}


def pairs() -> Mapping[str, Tensor]:
    """Return tokens for an encoder and for a decoder."""
    return {"input_ids": _drawn_tokens(5), "decoder_input_ids": _drawn_tokens(6)}


def speech() -> Mapping[str, Tensor]:
    """Return a spectrogram of 4 bands, and tokens for the decoder."""
    return {"input_features": _drawn(2, 4, 16), "decoder_input_ids": _drawn_tokens(6)}


def images() -> Mapping[str, Tensor]:
    """Return two pictures as transformers names them."""
    return {"pixel_values": _drawn(2, 3, 8, 8)}


def larger_images() -> Mapping[str, Tensor]:
    """Return pictures that leave several positions to each batch norm, which limits rounding."""
    return {"pixel_values": _drawn(2, 3, 32, 32)}


def drawn(*shape: int) -> Callable[[], Mapping[str, Tensor]]:
    """Return a function that returns `input_ids` of real numbers, the same at every call."""
    return lambda: {"input_ids": _drawn(*shape)}


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _drawn_tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, TOKENS, (2, LENGTH), generator=generator)
