"""Adapted models for merges in memory; a saved base and adapter for merges on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import LlamaForCausalLM

from lora_core import Identity, LoraConfig, inject, save_adapter

CONFIG = LoraConfig(r=4, lora_alpha=8)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return tmp_path / "merged"


@pytest.fixture
def prepare(
    build_llama: Callable[..., LlamaForCausalLM],
    randomize: Callable[[nn.Module], None],
    base: Path,
    adapter: Path,
) -> Callable[..., LlamaForCausalLM]:
    """Save a base and an adapter and return the adapted model."""

    def make(config: LoraConfig = CONFIG, shard: str = "1GB", **options: Any) -> LlamaForCausalLM:
        build_llama(**options).save_pretrained(base, max_shard_size=shard)
        model = build_llama(**options)
        inject(model, config, seed=0)
        randomize(model)
        save_adapter(model, adapter, config, Identity(base="tiny llama"))
        return model

    return make


@pytest.fixture
def files_in() -> Callable[[Path], dict[str, bytes]]:
    """Return the content of every file below a folder, including hidden ones, by relative path."""

    def read(folder: Path) -> dict[str, bytes]:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    return read


@pytest.fixture
def adapt(
    build_llama: Callable[..., LlamaForCausalLM], randomize: Callable[[nn.Module], None]
) -> Callable[..., LlamaForCausalLM]:
    """Build Llamas with an adapter that contains noise."""

    def make(config: LoraConfig = CONFIG, **options: object) -> LlamaForCausalLM:
        model = build_llama(**options)
        inject(model, config, seed=0)
        randomize(model)
        return model

    return make
