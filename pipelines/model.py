"""Load a prepared base: dense or NF4, with attention for packs or for generation."""

from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lora_core.base.quant import keep_layout
from lora_core.training.attention import Segment, packed_attention
from pipelines.hardware import Hardware
from pipelines.tokenizer import quiet

PACKED = "packed"
AttentionInterface.register(PACKED, packed_attention)


def load_model(folder: Path, quantization: str, hardware: Hardware) -> PreTrainedModel:
    """Load the causal language model in `folder`, in evaluation mode, on this process's device.

    Args:
        folder: Hugging Face format.
        quantization: nf4 (with double quantisation) or none.
        hardware: device and dtype.
    """
    quiet()
    options: dict[str, Any] = {"dtype": hardware.dtype, "device_map": {"": hardware.device}, "attn_implementation": PACKED}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=hardware.dtype,
            bnb_4bit_quant_storage=torch.uint8,
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    if quantization == "nf4":
        _let_go_of_the_file(model)
    keep_layout(model)
    model.eval()
    return model


def _let_go_of_the_file(model: PreTrainedModel) -> None:
    """Copy what was not quantised: as views into the checkpoint, they would hold all of its dense weights in memory."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
    """Return the last hidden states (T, D) of a pack, before the output head.

    Args:
        model: loaded by `load_model`.
        input_ids: (T,)
        position_ids: (T,), starting anew in each segment.
        segments: who attends to whom; their lengths add up to T.
    """
    body = model.get_decoder()
    output = body(input_ids=input_ids[None], position_ids=position_ids[None], segments=segments, use_cache=False)
    states: torch.Tensor = output.last_hidden_state[0]
    return states


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """Return the output head's weight (V, D), tied or not."""
    weight: torch.Tensor = model.get_output_embeddings().weight
    return weight


def attention_heads(model: PreTrainedModel) -> tuple[int, int, int] | None:
    """Return the heads of the queries, those of keys and values, and the width of one; None where the config has no heads."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return None
    width = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width
