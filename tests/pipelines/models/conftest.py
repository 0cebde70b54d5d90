"""Tiny models of several families, with weights so large that attention affects every loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.configs import tiny_config
from families.measure import built, drawn
from transformers import PreTrainedModel

from pipelines.models.packs import Pack, pack


@pytest.fixture(scope="session")
def family() -> Callable[..., PreTrainedModel]:
    """Return a function that makes tiny models by family; keywords change their config."""

    def make(name: str, **changes: Any) -> PreTrainedModel:
        return built(tiny_config(name, **changes))

    return make


@pytest.fixture(scope="session")
def examples_pack() -> Pack:
    """Four examples in a row, of 4 to 40 tokens."""
    return pack(drawn(), "cpu")


@pytest.fixture(autouse=True)
def reproducible() -> None:
    torch.manual_seed(0)
