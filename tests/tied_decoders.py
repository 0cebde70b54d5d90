"""Tiny decoders whose output head has the weight of the embedding."""

from collections.abc import Mapping

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedModel


def llama_config(sizes: Mapping[str, int]) -> LlamaConfig:
    """Return a config of a Llama with tied weights and grouped heads.

    Args:
        sizes: vocabulary, widths, and numbers of layers and heads, as transformers names them.
    """
    return LlamaConfig(
        **sizes, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2
    )


def gpt2() -> PreTrainedModel:
    """Return a model that ties its weights by default."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2
        )
    )
