"""The kinds of storage of a base: a layer and a tiny Llama in each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lora_core import LoraConfig
from lora_core.base.quant import disable_cpu_repacking

CONFIG = LoraConfig(r=4, lora_alpha=8)
IN, OUT, SCALE = 64, 96, 2.0


@dataclass(frozen=True)
class Storage:
    kind: str
    dtype: torch.dtype = torch.float32
    """The dtype of the computation."""
    double: bool = False
    threshold: float = 0.0
    """Magnitude from which int8 keeps an input in 16 bits; 0: never."""


STORAGES = {
    "bfloat16": Storage("dense", torch.bfloat16),
    "float16": Storage("dense", torch.float16),
    "nf4": Storage("nf4"),
    "nf4 double": Storage("nf4", double=True),
    "fp4": Storage("fp4"),
    "fp4 double": Storage("fp4", double=True),
    "fp4 in bfloat16": Storage("fp4", torch.bfloat16),
    "int8": Storage("int8"),
    "int8 outliers": Storage("int8", threshold=3.0),
    "int8 in bfloat16": Storage("int8", torch.bfloat16),
}


def loaded(folder: Path, storage: Storage) -> PreTrainedModel:
    """Load the tiny Llama in this storage; its codes are never repacked, on any processor."""
    settings: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": storage.threshold}
    if storage.kind in ("nf4", "fp4"):
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": storage.kind,
            "bnb_4bit_use_double_quant": storage.double,
            "bnb_4bit_compute_dtype": storage.dtype,
        }
    quantization: dict[str, Any] = {}
    if storage.kind != "dense":
        quantization["quantization_config"] = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=storage.dtype, **quantization)
    disable_cpu_repacking(model)
    return model


def linear(storage: Storage, *, bias: bool = True) -> nn.Module:
    """Return one layer; moving it to a device quantizes it."""
    torch.manual_seed(3)
    if storage.kind == "dense":
        return nn.Linear(IN, OUT, bias=bias, dtype=storage.dtype)
    if storage.kind == "int8":
        return bnb.nn.Linear8bitLt(
            IN, OUT, bias=bias, has_fp16_weights=False, threshold=storage.threshold
        ).to("cpu")
    layer = bnb.nn.Linear4bit(
        IN, OUT, bias=bias, quant_type=storage.kind, compress_statistics=storage.double
    ).to("cpu")
    disable_cpu_repacking(layer)
    return layer


def decoded(layer: nn.Module) -> Tensor:
    """Return the weight that a layer represents, in float64, from its codes and scales."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return layer.weight.data.double() * scales.double()[:, None] / 127
    if isinstance(layer, bnb.nn.Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    return layer.weight.detach().double()
