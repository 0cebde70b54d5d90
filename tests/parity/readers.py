"""Readers of exports that share no code with the exporter; each computes ΔW as its program does.

Sources: vLLM's vllm/lora/peft_helper.py, lora_model.py and utils.py; llama.cpp's
src/llama-adapter.{h,cpp}.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Updates = dict[str, Tensor]
"""Module path → ΔW, (out, in)."""
IN_HUGGING_FACE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def adapter_values(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json."""
    values: dict[str, Any] = json.loads(
        (folder / "adapter_config.json").read_text(encoding="utf-8")
    )
    return values


def vllm_objections(folder: Path, base: nn.Module, max_rank: int) -> list[str]:
    """Return what vLLM's loader would refuse or silently misread."""
    values, tensors = adapter_values(folder), load_file(folder / "adapter_model.safetensors")
    found = [
        f"{key} is missing" for key in ("r", "lora_alpha", "target_modules") if key not in values
    ]
    found += [
        f"{key} is set"
        for key in ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")
        if values.get(key)
    ]
    if values.get("bias", "none") != "none" or values.get("r", 0) > max_rank:
        found.append(f"bias is {values.get('bias')}, r is {values.get('r')}")
    linear = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
    }
    for key, tensor in tensors.items():
        module, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
        if (
            not key.startswith("base_model.model.")
            or factor not in ("A.weight", "B.weight")
            or module.rpartition(".")[2] not in linear
        ):
            found.append(f"{key} is not a factor of a linear layer")
        elif tensor.shape["AB".index(factor[0])] != values.get("r"):
            found.append(f"{key} has the shape {tuple(tensor.shape)}")
    return found


def vllm_updates(folder: Path) -> Updates:
    """Return the updates that vLLM computes, with one scale: alpha / r or alpha / √r."""
    values, tensors = adapter_values(folder), load_file(folder / "adapter_model.safetensors")
    scale = values["lora_alpha"] / (values["r"] ** 0.5 if values["use_rslora"] else values["r"])
    names = [
        key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")
    ]
    assert len(tensors) == 2 * len(names)
    return {
        name.removeprefix("base_model.model."): scale
        * (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"])
        for name in names
    }


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a GGUF file's metadata and tensors."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def gguf_objections(path: Path, base: nn.Module) -> list[str]:
    """Return what llama.cpp would refuse in an adapter for a Llama."""
    fields, tensors = read_gguf(path)
    wanted = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    found = [
        f"{key} is {fields.get(key)!r}" for key, value in wanted.items() if fields.get(key) != value
    ]
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
    }
    for key in tensors:
        name, _, factor = key.rpartition(".lora_")
        a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if factor not in ("a", "b") or a is None or b is None:
            found.append(f"{key} is not a factor of a pair")
        elif a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != shapes.get(module_of(name)):
            found.append(f"{name} has factors of {a.shape} and {b.shape}")
    return found


def gguf_updates(path: Path, heads: int, key_heads: int) -> Updates:
    """Return the updates that llama.cpp computes, alpha / (rank of the tensor) · B A.

    The rows of a Llama's q and k are in Hugging Face's order.
    """
    fields, tensors = read_gguf(path)
    found = {}
    for name in [key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")]:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        delta = torch.from_numpy(fields["adapter.lora.alpha"] / b.shape[1] * (b @ a))
        head_count = {"attn_q": heads, "attn_k": key_heads}.get(name.split(".")[2])
        if head_count:
            count = len(delta)
            rows = [row_in_hugging_face(row, head_count, count) for row in range(count)]
            delta[rows] = delta.clone()
        found[module_of(name)] = delta
    return found


def module_of(name: str) -> str:
    """Return the Hugging Face module path of a tensor of a block, blk.<layer>.<kind>.weight."""
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{IN_HUGGING_FACE[kind]}"


def row_in_hugging_face(row: int, heads: int, rows: int) -> int:
    """Return the index in Hugging Face's weight of llama.cpp's row of q or k.

    Even rows belong to a head's first half, odd ones to its second.
    """
    width = rows // heads
    head, index = divmod(row, width)
    return head * width + index // 2 + (index % 2) * (width // 2)
