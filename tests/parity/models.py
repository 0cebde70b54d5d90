"""Tiny random models whose adapters are compared, dense or quantized by bitsandbytes.

Each function uses torch's global seed: the same seed gives the same bits.
"""

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from lora_core.base.quant import disable_cpu_repacking

Build = Callable[[], nn.Module]
VOCABULARY, LABELS = 101, 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# With the usual 0.02, a tiny model's logits hardly depend on its layers.
SIZES |= {"initializer_range": 0.2}
GROUPED = {**SIZES, "num_key_value_heads": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def llama(*, tied: bool = False, bias: bool = False) -> nn.Module:
    """Grouped heads, gated MLP."""
    return LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=tied, attention_bias=bias))


def phi3() -> nn.Module:
    """One matrix for q, k and v, and one for gate and up."""
    return Phi3ForCausalLM(
        Phi3Config(
            **GROUPED,
            max_position_embeddings=32,
            original_max_position_embeddings=32,
            pad_token_id=0,
        )
    )


def gemma() -> nn.Module:
    """An embedding that scales its vectors itself."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**GROUPED, head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=False)
    )


def gpt2() -> nn.Module:
    """One matrix for q, k and v, in a `Conv1D`, which stores it transposed."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, **sizes, **NO_DROPOUT, initializer_range=0.2)
    )


def bert() -> nn.Module:
    """An encoder with a classifier."""
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(
        BertConfig(**SIZES, **drops, max_position_embeddings=32, num_labels=LABELS)
    )


def mixtral() -> nn.Module:
    """Four experts in 3-D weights, two for each token."""
    config = MixtralConfig(
        **{**GROUPED, "intermediate_size": 48}, num_local_experts=4, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"  # grouped kernels add in another order
    return MixtralForCausalLM(config)


class Pictures(nn.Module):
    """Convolutions as in a diffusion model: strided, 1×1, with and without bias.

    PEFT cannot adapt dilated ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.proj_out = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(input_ids))))
        logits: Tensor = self.head(self.proj_out(x).mean(dim=(2, 3)))
        return logits


def cast(build: Build, dtype: torch.dtype) -> Build:
    """Return a function that builds the same model in another dtype."""
    return lambda: build().to(dtype)


def stored(build: Build, **settings: Any) -> Build:
    """Return a function that builds the same model and loads it, quantized by bitsandbytes."""

    def make() -> nn.Module:
        with TemporaryDirectory() as folder:
            build().save_pretrained(folder)
            config = BitsAndBytesConfig(**settings)
            model: nn.Module = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=config, dtype=torch.float32
            )
        # In evaluation, bitsandbytes would round the codes' scales again on some processors.
        disable_cpu_repacking(model)
        return model

    return make
