"""An adapter's tensors as llama.cpp names, scales and orders them.

    blk.<layer>.<kind>.weight.lora_a (r, in), .lora_b (out, r)      adapter.lora.alpha, one for the file

llama.cpp forms alpha / r · B A with the r of each pair, so that ranks may differ; whatever else a scale holds goes
into B. A Llama's q and k are stored with the two halves of each head interleaved, so their B is reordered likewise.

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
"""Architecture in GGUF → the model_type of Hugging Face configs whose weights llama.cpp stores under it."""
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
GGUF_INTERLEAVES = frozenset({"llama"})


def base_values(base_config: Path, architecture: str) -> dict[str, Any]:
    """Return the values of the base's config.json, having checked that they are of this architecture."""
    if architecture not in GGUF_MODELS:
        raise ExportError(
            f"architecture={architecture!r} is unknown here; use {', '.join(GGUF_MODELS)}, or export a merged model and convert it"
        )
    path = base_config / CONFIG if base_config.is_dir() else base_config
    values = read_object(path)
    if values.get("model_type") not in GGUF_MODELS[architecture]:
        raise ExportError(
            f"{path} is of the model_type {values.get('model_type')!r}, which llama.cpp does not store as {architecture}; "
            f"{architecture} holds {' and '.join(GGUF_MODELS[architecture])}"
        )
    missing = [key for key in SIZES if not isinstance(values.get(key), int)]
    if missing:
        raise CheckpointError(f"{path} has no {missing[0]}; give the config.json of the base")
    return values


def gguf_tensors(
    updates: Mapping[str, Update], base: dict[str, Any], architecture: str, *, alpha: float
) -> dict[str, Tensor]:
    """Return the file's tensors: llama.cpp forms alpha / r · B A, so what the scale differs by goes into B."""
    tensors, shapes = {}, _gguf_shapes(base)
    for module, update in updates.items():
        name = _gguf_name(module, base, architecture)
        expected = shapes.get(name.removesuffix(".weight").rpartition(".")[2])
        if update.shape != expected:
            raise ExportError(
                f"the update of {module} is {update.shape} and this base has {expected} there; give the base it was trained on"
            )
        b = update.b.float() * (update.scale * update.rank / alpha)
        heads = _heads(module, base) if architecture in GGUF_INTERLEAVES else None
        tensors[f"{name}.lora_a"] = update.a.float().contiguous()
        tensors[f"{name}.lora_b"] = (
            b if heads is None else b[interleaved(b.shape[0], heads)]
        ).contiguous()
    return tensors


def _gguf_name(module: str, base: dict[str, Any], architecture: str) -> str:
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], int(base["num_hidden_layers"]))
    name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
    if name is None:
        raise ExportError(
            f"llama.cpp's {architecture} has no tensor for {module}; leave it out of target_modules, or export a merged model"
        )
    if name == "output.weight" and base.get("tie_word_embeddings"):
        raise ExportError(
            f"{module} is tied to the embedding and has no tensor in GGUF; leave it out of target_modules"
        )
    return name


def _gguf_shapes(base: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return what each linear layer of a block is in GGUF, and its (out, in)."""
    hidden, inner, heads = (
        base["hidden_size"],
        base["intermediate_size"],
        base["num_attention_heads"],
    )
    width = base.get("head_dim") or hidden // heads
    keys = (base.get("num_key_value_heads") or heads) * width
    attention = {
        "attn_q": (heads * width, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, heads * width),
    }
    feed_forward = {
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    return {**attention, **feed_forward, "output": (base["vocab_size"], hidden)}


def _heads(module: str, base: dict[str, Any]) -> int | None:
    """Return the number of heads whose rows llama.cpp interleaves in this module; None where it keeps the order."""
    counts = {
        "q_proj": base["num_attention_heads"],
        "k_proj": base.get("num_key_value_heads") or base["num_attention_heads"],
    }
    return counts.get(module.rpartition(".")[2])


def interleaved(rows: int, heads: int) -> Tensor:
    """Return the order in which llama.cpp stores the rows of q and k: within a head 0, h, 1, h+1, … with h its half.

    Hugging Face rotates row i of a head with row i + h, llama.cpp row 2i with row 2i + 1.
    """
    return torch.arange(rows).view(heads, 2, -1).mT.reshape(-1)


def write_gguf(path: Path, tensors: Mapping[str, Tensor], architecture: str, alpha: float) -> None:
    """Write the tensors, in float32, and what llama.cpp asks of an adapter's file."""
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
