"""An adapter's tensors with llama.cpp's names, scale and row order.

    blk.<layer>.<kind>.weight.lora_a (r, in), .lora_b (out, r)      adapter.lora.alpha, one per file

llama.cpp computes alpha / r · B A with the r of each pair, so ranks can differ; the rest of the
scale is folded into B. It stores a Llama's q and k with the two halves of each head interleaved, so
their B is reordered the same way.

Sources: llama.cpp's convert_lora_to_gguf.py, convert_hf_to_gguf.py and src/llama-adapter.{h,cpp}.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
"""Sizes that config.json must have."""
GGUF_INTERLEAVES = frozenset({"llama"})
"""Architectures whose q and k llama.cpp stores with interleaved halves of each head."""


@dataclass(frozen=True)
class GgufBase:
    """What the export needs from the config.json of the base."""

    architecture: str
    """Name of the architecture in GGUF."""
    vocabulary: int
    hidden: int
    """Width of the residual stream."""
    inner: int
    """Width of the MLP."""
    layers: int
    heads: int
    """Number of query heads."""
    key_heads: int
    """Number of key and value heads."""
    head_width: int
    is_tied: bool
    """The output head is tied to the embedding."""

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return GGUF's name of each linear layer → its shape (out, in)."""
        queries = self.heads * self.head_width
        keys = self.key_heads * self.head_width
        return {
            "attn_q": (queries, self.hidden),
            "attn_k": (keys, self.hidden),
            "attn_v": (keys, self.hidden),
            "attn_output": (self.hidden, queries),
            "ffn_gate": (self.inner, self.hidden),
            "ffn_up": (self.inner, self.hidden),
            "ffn_down": (self.hidden, self.inner),
            "output": (self.vocabulary, self.hidden),
        }

    def interleaved_heads(self, module: str) -> int | None:
        """Return the number of heads that llama.cpp interleaves in a module; None if it does not.

        Args:
            module: path of a linear layer in the model.
        """
        if self.architecture not in GGUF_INTERLEAVES:
            return None
        heads = {"q_proj": self.heads, "k_proj": self.key_heads}
        name = module.rpartition(".")[2]
        return heads.get(name)


def gguf_architecture(base: Path) -> str:
    """Return the architecture in GGUF of the base in a folder.

    Raises:
        CheckpointError: its config.json is missing or malformed.
        ExportError: adapters are not written for llama.cpp of this type of model.
    """
    model_type = read_object(base / CONFIG).get("model_type")
    for architecture, model_types in GGUF_MODELS.items():
        if model_type in model_types:
            return architecture
    known = ", ".join(name for model_types in GGUF_MODELS.values() for name in model_types)
    raise ExportError(
        f"{base} is a {model_type!r} model, but adapters are written for llama.cpp of {known} "
        "only; merge the adapter and convert the merged model"
    )


def read_base(base_config: Path, architecture: str) -> GgufBase:
    """Read the base's config.json and check its architecture and sizes.

    Args:
        base_config: the file, or its folder.
        architecture: the base's architecture in GGUF.

    Raises:
        CheckpointError: the file is missing or malformed, or lacks a size.
        ExportError: the architecture is not supported, or is not that of the base.
    """
    if architecture not in GGUF_MODELS:
        raise ExportError(
            f"architecture={architecture!r} is not supported; use {', '.join(GGUF_MODELS)}, or "
            "export a merged model and convert it"
        )
    path = base_config / CONFIG if base_config.is_dir() else base_config
    values = read_object(path)
    model_types = GGUF_MODELS[architecture]
    model_type = values.get("model_type")
    if model_type not in model_types:
        raise ExportError(
            f"{path} has the model_type {model_type!r}, which llama.cpp does not "
            f"store as {architecture}; use a base of the type {' or '.join(model_types)}"
        )
    vocabulary, hidden, inner, layers, heads = _sizes(values, path)
    return GgufBase(
        architecture=architecture,
        vocabulary=vocabulary,
        hidden=hidden,
        inner=inner,
        layers=layers,
        heads=heads,
        key_heads=values.get("num_key_value_heads") or heads,
        head_width=values.get("head_dim") or hidden // heads,
        is_tied=bool(values.get("tie_word_embeddings")),
    )


def gguf_tensors(
    updates: Mapping[str, Update],
    base: GgufBase,
    *,
    alpha: float,
) -> dict[str, Tensor]:
    """Return the file's tensors.

    llama.cpp computes alpha / r · B A, so a scale that differs from alpha / r is folded into B.

    Args:
        updates: module path → update.
        base: the model that they belong to.
        alpha: the file's alpha.

    Returns:
        GGUF's name → tensor in float32: lora_a (r, in) and lora_b (out, r) of each module.

    Raises:
        ExportError: llama.cpp has no tensor for a module, or the base has another shape there.
    """
    tensors: dict[str, Tensor] = {}
    shapes = base.shapes()
    for module, update in updates.items():
        name = _gguf_name(module, base)
        kind = name.removesuffix(".weight").rpartition(".")[2]
        expected = shapes.get(kind)
        if update.shape != expected:
            raise ExportError(
                f"the update of {module} is {update.shape}, but this base has {expected} there; "
                "give the base it was trained on"
            )
        b = update.b.float() * (update.scale * update.rank / alpha)
        heads = base.interleaved_heads(module)
        if heads is not None:
            b = b[interleaved(b.shape[0], heads)]
        tensors[f"{name}.lora_a"] = update.a.float().contiguous()
        tensors[f"{name}.lora_b"] = b.contiguous()
    return tensors


def _sizes(values: Mapping[str, Any], path: Path) -> list[int]:
    """Return the values of `SIZES` in their order."""
    sizes = []
    for key in SIZES:
        size = values.get(key)
        if not isinstance(size, int):
            raise CheckpointError(f"{path} has no {key}; give the config.json of the base")
        sizes.append(size)
    return sizes


def _gguf_name(module: str, base: GgufBase) -> str:
    """Return llama.cpp's name for the weight of a module."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[base.architecture], base.layers)
    name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
    if name is None:
        raise ExportError(
            f"llama.cpp's {base.architecture} has no tensor for {module}; leave it out of "
            "target_modules, or export a merged model"
        )
    if name == "output.weight" and base.is_tied:
        raise ExportError(
            f"{module} is tied to the embedding and has no tensor in GGUF; leave it out of "
            "target_modules"
        )
    return name


def interleaved(rows: int, heads: int) -> Tensor:
    """Return llama.cpp's order of the rows of q and k.

    Within a head it is 0, h, 1, h+1, … with h half the rows of a head. Hugging Face rotates row i
    of a head with row i + h, llama.cpp row 2i with row 2i + 1.

    Args:
        rows: of all heads.
        heads: a divisor of `rows`.

    Returns:
        (rows,) of int64.
    """
    halves = torch.arange(rows).view(heads, 2, -1)
    return halves.mT.reshape(-1)


def write_gguf(path: Path, tensors: Mapping[str, Tensor], architecture: str, alpha: float) -> None:
    """Write the tensors and the metadata that llama.cpp requires of an adapter.

    Args:
        path: created or replaced.
        tensors: GGUF's name → tensor in float32.
        architecture: the base's architecture in GGUF.
        alpha: numerator of the scale alpha / r.
    """
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
    """Read the tensors of an adapter's file, by GGUF's name."""
    import gguf

    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        copy = tensor.data.copy()  # the reader maps the file
        tensors[tensor.name] = torch.from_numpy(copy)
    return tensors
