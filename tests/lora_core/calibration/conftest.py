"""Fixtures of the tests of data-driven initialization."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def calibration_batches(tokens: Tensor) -> Callable[[nn.Module], list[Callable[[], object]]]:
    """Return a factory of batches for a language model, one row of tokens each."""

    def make(model: nn.Module) -> list[Callable[[], object]]:
        return [partial(model, input_ids=row[None], use_cache=False) for row in tokens]

    return make


@pytest.fixture
def originals(llama_folder: Path) -> dict[str, Tensor]:
    """The weights of the saved Llama by module path, without quantization."""
    state = AutoModelForCausalLM.from_pretrained(llama_folder).state_dict()
    return {name.removesuffix(".weight"): value for name, value in state.items()}


@pytest.fixture
def quantized(llama_folder: Path) -> Callable[[str], LlamaForCausalLM]:
    """Return a loader of the saved Llama in nf4, fp4 or int8, in training mode."""

    def load(kind: str) -> LlamaForCausalLM:
        settings = BitsAndBytesConfig(load_in_8bit=True)
        if kind != "int8":
            settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
        model = AutoModelForCausalLM.from_pretrained(
            llama_folder, quantization_config=settings, dtype=torch.float32
        )
        return model.train()

    return load
