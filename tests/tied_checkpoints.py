"""Saved models whose head and embedding are tied, and the files of their merges."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tied_decoders import gpt2, llama_config
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

V = 64
SIZES = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""The embedding is square, so its shape does not reveal its layout."""


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(llama_config(SIZES))


def neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**SIZES, tie_word_embeddings=True, initializer_range=0.2)
    )


def untied_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**SIZES, tie_word_embeddings=False, initializer_range=0.2)
    )


def classifier() -> PreTrainedModel:
    """Return a model that is configured as tied but has no head."""
    return LlamaForSequenceClassification(llama_config(SIZES))


def bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=32))


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )


CASES = {
    "head": (llama, ("lm_head", "q_proj")),
    "embedding": (llama, ("embed_tokens", "q_proj")),
    "both": (llama, ("embed_tokens", "lm_head")),
    "gpt2 head": (gpt2, ("lm_head",)),
    "gpt2 embedding": (gpt2, ("wte",)),
    "gpt2 positions": (gpt2, ("wpe",)),
    "neox embedding": (neox, ("embed_in",)),
    "neox head": (neox, ("lm_head",)),
    "untied neox head": (untied_neox, ("lm_head",)),
    "classifier": (classifier, ("embed_tokens",)),
}


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def values(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
