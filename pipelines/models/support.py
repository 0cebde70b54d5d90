"""Which bases are supported, decided from config and class before any weight is loaded.

A causal language model whose layers all attend through transformers' attention interface can be
read in packs. Any other causal language model is read one example at a time, by its own forward.
A model that is not causal is refused. This module only skips what cannot work;
`pipelines.models.equivalence` makes the final decision at run time.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from pipelines.errors import BaseModelError

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers, as configs name them, that read the past through an attention mask alone."""
BODIES = ("model", "transformer")
"""Attributes that may hold the body of a model that does not name it."""
ENCODERS = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet"}
ENCODER_DECODERS = {
    *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    *modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
DECODER_ONLY = "Llama, Qwen or Mistral"
"""Families that messages recommend."""


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse a base that is not a causal language model.

    Raises:
        BaseModelError: the family, what it does, and what to use instead.
    """
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False) or family in ENCODER_DECODERS:
        raise BaseModelError(
            f"base model family {family!r} is an encoder-decoder, which reads a source with one "
            "half and writes with the other; this pipeline trains causal language models only; "
            f"take a decoder-only base such as {DECODER_ONLY}"
        )
    if family in ENCODERS:
        raise BaseModelError(
            f"base model family {family!r} is an encoder, whose tokens attend in both directions; "
            "this pipeline trains causal language models only; "
            f"take a decoder-only base such as {DECODER_ONLY}"
        )
    is_causal = family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not is_causal and not _has_custom_class(config):
        reads_images = family in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        kind = "a vision-language model" if reads_images else "not a causal language model"
        raise BaseModelError(
            f"base model family {family!r} is {kind} for transformers, which has no class of it "
            "that reads text alone; take the language model that it is built on, or a decoder-only "
            f"base such as {DECODER_ONLY}"
        )


def why_not_packed(model: nn.Module) -> str | None:
    """Return why a model cannot read several examples in one row; None if no reason is known.

    Args:
        model: on any device, the meta device included.
    """
    family = getattr(model.config, "model_type", type(model).__name__)
    if not isinstance(model, PreTrainedModel) or not _attends_by_interface(model):
        return f"{family} does not attend through transformers' attention interface"
    if getattr(model, "_is_stateful", False):
        return f"{family} carries a recurrent state from token to token"
    others = sorted(_layer_kinds(model.config) - ATTENTION_LAYERS)
    if others:
        return f"{family} has layers of kind {', '.join(others)}"
    return None


def context_tokens(config: PreTrainedConfig) -> int | None:
    """Return the context length in a base's config, in tokens; None if the config has none."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_checkpointing(model: PreTrainedModel) -> None:
    """Refuse a family whose blocks cannot be recomputed in the backward pass.

    Raises:
        BaseModelError: the family has no gradient checkpointing.
    """
    if not model.supports_gradient_checkpointing:
        raise BaseModelError(
            "training.gradient_checkpointing is true, and base model family "
            f"{model.config.model_type!r} does not support it; set it to false, and if memory is "
            "short raise training.gradient_accumulation_steps or lower data.max_tokens"
        )


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute blocks in the backward pass.

    Raises:
        BaseModelError: see `check_checkpointing`.
    """
    check_checkpointing(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def is_wrapper(config: PreTrainedConfig) -> bool:
    """Return whether a model wraps a language model and other parts, such as a vision tower."""
    return config.get_text_config() is not config


def _has_custom_class(config: PreTrainedConfig) -> bool:
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def text_body(model: PreTrainedModel) -> nn.Module:
    """Return the part that turns tokens into the hidden states that the head reads.

    In a wrapper it is the body of the language model alone.
    """
    if is_wrapper(model.config):
        return model.get_decoder()  # type: ignore[no-any-return]
    bodies = (
        model.base_model,
        *(getattr(model, name, model) for name in BODIES),
        model.get_decoder(),
    )
    return next((body for body in bodies if body is not model), model)


def _attends_by_interface(model: PreTrainedModel) -> bool:
    """Return whether the attention function of every part of the language model can be set."""
    if not model._can_set_attn_implementation():
        return False
    for module in text_body(model).modules():
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            return False
    return True


def _layer_kinds(config: Any) -> set[str]:
    text_config = config.get_text_config()
    for name in ("layer_types", "layers_block_type"):
        kinds = getattr(text_config, name, None)
        if kinds:
            return {str(kind) for kind in kinds}
    return set()
