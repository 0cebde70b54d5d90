"""Models that share weights, and adapters over the users of a shared weight."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tied_decoders import gpt2, llama_config
from torch import Tensor, nn
from trained_noise import add_noise
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from lora_core import LoraConfig, inject

V = 101
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(llama_config(SIZES))


def llava() -> PreTrainedModel:
    """Return a model with a nested text config; both configs declare the head as tied."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=llama_config(SIZES),
        image_token_index=V - 1,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def bert() -> PreTrainedModel:
    """Return a model that also ties a bias, so one tie is left."""
    return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=32, initializer_range=0.2))


def umt5() -> PreTrainedModel:
    """Return a model with four users of one weight; it scales its logits by the config's flag."""
    sizes = {
        "vocab_size": V,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    return UMT5ForConditionalGeneration(UMT5Config(**sizes, decoder_start_token_id=0))


@dataclass(frozen=True)
class TieCase:
    build: Callable[[], PreTrainedModel]
    settings: dict[str, Any]
    stays_tied: bool = False
    """The config's flag after the merge."""
    only_rows: bool = False
    """Only rows of the shared weight are trained, so it stays shared."""

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(**self.settings)


def case(
    build: Callable[[], PreTrainedModel],
    *targets: str,
    stays_tied: bool = False,
    only_rows: bool = False,
    **settings: Any,
) -> TieCase:
    common = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    return TieCase(build, {**common, **settings}, stays_tied, only_rows)


CASES = {
    "head": case(llama, "lm_head", "q_proj"),
    "embedding": case(llama, "embed_tokens"),
    "both": case(llama, "embed_tokens", "lm_head"),
    "dora": case(llama, "lm_head", use_dora=True),
    "dora embedding": case(llama, "embed_tokens", use_dora=True),
    "full head": case(llama, "q_proj", modules_to_save=("lm_head",)),
    "full embedding": case(llama, "q_proj", modules_to_save=("embed_tokens",)),
    "both full": case(llama, "q_proj", modules_to_save=("embed_tokens", "lm_head")),
    "head and full embedding": case(llama, "lm_head", modules_to_save=("embed_tokens",)),
    "rows": case(
        llama,
        "q_proj",
        trainable_token_indices={"embed_tokens": (3, 7)},
        stays_tied=True,
        only_rows=True,
    ),
    "gpt2 head": case(gpt2, "lm_head"),
    "gpt2 embedding": case(gpt2, "wte", "c_attn"),
    "llava head": case(llava, "lm_head"),
    "llava embedding": case(llava, "embed_tokens"),
    "bert head": case(bert, "cls.predictions.decoder", stays_tied=True),
    "bert embedding": case(bert, "word_embeddings", stays_tied=True),
    "umt5 head": case(umt5, "lm_head", stays_tied=True),
    "umt5 encoder": case(umt5, "encoder.embed_tokens", stays_tied=True),
    "umt5 shared": case(umt5, "shared", stays_tied=True),
    "umt5 all": case(
        umt5, "shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head", stays_tied=True
    ),
    "umt5 rows": case(
        umt5,
        "q",
        trainable_token_indices={"encoder.embed_tokens": (3, 7)},
        stays_tied=True,
        only_rows=True,
    ),
}
each_case = pytest.mark.parametrize("one", CASES.values(), ids=CASES.keys())


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    # Few different rows, so that the trained ones occur.
    ids = torch.randint(2, 12, (2, 9), generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, ::2]
    return model(**inputs).logits


def base(one: TieCase) -> PreTrainedModel:
    torch.manual_seed(0)
    return one.build().eval()


def adapted(one: TieCase) -> PreTrainedModel:
    model = base(one)
    inject(model, one.lora, seed=0)
    add_noise(model)
    return model


def objects(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def tied_flags(model: PreTrainedModel) -> list[bool]:
    configs = (model.config, model.config.get_text_config())
    return [config.tie_word_embeddings for config in configs]
