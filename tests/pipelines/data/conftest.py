"""Tokenizers with and without a chat template."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from pipelines.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def chat(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_folder)


@pytest.fixture(scope="module")
def plain(plain_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(plain_folder)
