"""Load a prepared base, dense or in NF4, with the attention that its code defines.

`pipelines.models` reads packs with it.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lora_core.base.quant import disable_cpu_repacking
from pipelines.models.forward import EAGER
from pipelines.models.hardware import AttentionShape, Hardware
from pipelines.models.support import check_supported
from pipelines.models.tokenizer import quiet


def load_model(
    folder: Path,
    quantization: str,
    hardware: Hardware,
    *,
    masters: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the causal language model in `folder`, in evaluation mode, on this process's device.

    Args:
        folder: Hugging Face format.
        quantization: nf4 (with double quantization) or none.
        hardware: device and dtype.
        masters: keep the weights in float32 for any dtype of the computation, since all of them
            are trained.
        trust_remote_code: run the code that comes with it.

    Raises:
        BaseModelError: it is not a causal language model.
    """
    quiet()
    check_supported(AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code))
    options: dict[str, Any] = {
        "dtype": torch.float32 if masters else hardware.states,
        "device_map": {"": hardware.device},
        "attn_implementation": EAGER,
    }
    if quantization == "nf4":
        options["quantization_config"] = _double_quantized_nf4(hardware.dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, **options
    )
    if quantization == "nf4":
        _detach_from_mmap(model)
    disable_cpu_repacking(model)
    model.eval()
    return model


def _double_quantized_nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def _detach_from_mmap(model: PreTrainedModel) -> None:
    """Copy what is not quantized.

    As views into the checkpoint, these weights would keep all dense weights of it in memory.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def attention_heads(model: PreTrainedModel) -> AttentionShape | None:
    """Return the attention heads of a model's layers; None if the config has none."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):  # some configs have one number for each layer
        return None
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    if not size:
        size = config.hidden_size // heads
    return AttentionShape(heads, key_heads, size)
