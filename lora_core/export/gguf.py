"""An adapter's tensors with llama.cpp's names, scale and row order.

    blk.<layer>.<kind>.weight.lora_a (r, in), .lora_b (out, r)      adapter.lora.alpha, one per file

llama.cpp computes alpha / r · B A with the r of each pair, so ranks can differ; the rest of the
scale is folded into B. It stores a Llama's q and k with the two halves of each head interleaved, so
their B is reordered the same way.

Sources: llama.cpp's convert_lora_to_gguf.py, convert_hf_to_gguf.py and src/llama-adapter.{h,cpp}.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.base.weight_files import CONFIG, read_object
from lora_core.errors import CheckpointError, ExportError
from lora_core.spectrum.updates import Update

GGUF_MODELS = {"llama": ("llama", "mistral"), "qwen2": ("qwen2",), "qwen3": ("qwen3",)}
"""Architecture in GGUF → the Hugging Face model types that llama.cpp stores under it."""
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
GGUF_INTERLEAVES = frozenset({"llama"})
"""Architectures whose q and k llama.cpp stores with interleaved halves of each head."""


def base_values(base_config: Path, architecture: str) -> dict[str, Any]:
    """Return the values of the base's config.json after checking its architecture and sizes."""
    if architecture not in GGUF_MODELS:
        raise ExportError(
            f"architecture={architecture!r} is not supported; use {', '.join(GGUF_MODELS)}, or "
            "export a merged model and convert it"
        )
    path = base_config / CONFIG if base_config.is_dir() else base_config
    values = read_object(path)
    model_types = GGUF_MODELS[architecture]
    if values.get("model_type") not in model_types:
        raise ExportError(
            f"{path} has the model_type {values.get('model_type')!r}, which llama.cpp does not "
            f"store as {architecture}; use a base of the type {' or '.join(model_types)}"
        )
    missing = [key for key in SIZES if not isinstance(values.get(key), int)]
    if missing:
        raise CheckpointError(f"{path} has no {missing[0]}; give the config.json of the base")
    return values


def gguf_tensors(
    updates: Mapping[str, Update], base: dict[str, Any], architecture: str, *, alpha: float
) -> dict[str, Tensor]:
    """Return the file's tensors.

    llama.cpp computes alpha / r · B A, so a scale that differs from alpha / r is folded into B.
    """
    tensors: dict[str, Tensor] = {}
    shapes = _gguf_shapes(base)
    for module, update in updates.items():
        name = _gguf_name(module, base, architecture)
        kind = name.removesuffix(".weight").rpartition(".")[2]
        expected = shapes.get(kind)
        if update.shape != expected:
            raise ExportError(
                f"the update of {module} is {update.shape}, but this base has {expected} there; "
                "give the base it was trained on"
            )
        b = update.b.float() * (update.scale * update.rank / alpha)
        heads = _heads(module, base) if architecture in GGUF_INTERLEAVES else None
        if heads is not None:
            b = b[interleaved(b.shape[0], heads)]
        tensors[f"{name}.lora_a"] = update.a.float().contiguous()
        tensors[f"{name}.lora_b"] = b.contiguous()
    return tensors


def _gguf_name(module: str, base: dict[str, Any], architecture: str) -> str:
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], int(base["num_hidden_layers"]))
    name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
    if name is None:
        raise ExportError(
            f"llama.cpp's {architecture} has no tensor for {module}; leave it out of "
            "target_modules, or export a merged model"
        )
    if name == "output.weight" and base.get("tie_word_embeddings"):
        raise ExportError(
            f"{module} is tied to the embedding and has no tensor in GGUF; leave it out of "
            "target_modules"
        )
    return name


def _gguf_shapes(base: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return GGUF's name of each linear layer and its shape (out, in)."""
    hidden = base["hidden_size"]
    inner = base["intermediate_size"]
    heads = base["num_attention_heads"]
    head_width = base.get("head_dim") or hidden // heads
    queries = heads * head_width
    keys = (base.get("num_key_value_heads") or heads) * head_width
    return {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "output": (base["vocab_size"], hidden),
    }


def _heads(module: str, base: dict[str, Any]) -> int | None:
    """Return the number of heads that llama.cpp interleaves in this module; None if it does not."""
    counts = {
        "q_proj": base["num_attention_heads"],
        "k_proj": base.get("num_key_value_heads") or base["num_attention_heads"],
    }
    return counts.get(module.rpartition(".")[2])


def interleaved(rows: int, heads: int) -> Tensor:
    """Return llama.cpp's order of the rows of q and k.

    Within a head it is 0, h, 1, h+1, … with h half the rows of a head. Hugging Face rotates row i
    of a head with row i + h, llama.cpp row 2i with row 2i + 1.
    """
    return torch.arange(rows).view(heads, 2, -1).mT.reshape(-1)


def write_gguf(path: Path, tensors: Mapping[str, Tensor], architecture: str, alpha: float) -> None:
    """Write the tensors, in float32, and the metadata that llama.cpp requires of an adapter."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter's file."""
    import gguf

    return {
        tensor.name: torch.from_numpy(tensor.data.copy())
        for tensor in gguf.GGUFReader(path).tensors
    }
