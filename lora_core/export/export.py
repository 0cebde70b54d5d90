"""Export an adapter: unchanged for PEFT, flattened for vLLM, as GGUF for llama.cpp, or merged.

Each export expresses the same ΔW = s·B·A in one reader's format and refuses what that reader would
misread:

    vLLM        supports one rank and one scale and ignores rank_pattern and alpha_pattern, so every
                update is padded with zeros to one rank, and its scale is folded into B.
    llama.cpp   scales an update by alpha / (rank of its tensor), and stores a Llama's q and k with
                the two halves of each head interleaved, so their B is reordered the same way.

Each result is read again and compared before it replaces the destination.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from lora_core.adapter.adapter_files import file_digests, read_tensors
from lora_core.adapter.json_files import CONFIG, IDENTITY, PREFIX, WEIGHTS, read_identity, read_json
from lora_core.adapter.peft_config import read_config
from lora_core.errors import ExportError
from lora_core.export.gguf import gguf_tensors, read_base, read_gguf, write_gguf
from lora_core.files import (
    atomic_file,
    atomic_folder,
    overlap,
    sha256_of_file,
    write_json,
)
from lora_core.merging.streaming import merge_checkpoint
from lora_core.spectrum.updates import Update, read_updates

export_merged = merge_checkpoint

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's values of max_lora_rank; newer versions also accept 1, which saves nothing here."""
VLLM_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "fully trained modules",
    "bias": "trained biases",
    "lora_bias": "bias in B",
    "trainable_token_indices": "trained token rows",
}
"""Fields of adapter_config.json that vLLM does not support → what they enable."""
OFF: tuple[Any, ...] = (None, False, "none", [], {})
"""Values of adapter_config.json that turn a feature off."""


def export_peft(adapter: Path, destination: Path) -> str:
    """Read an adapter completely and copy it unchanged.

    Args:
        adapter: in PEFT's format.
        destination: created or replaced.

    Returns:
        The SHA-256 of its weights.

    Raises:
        AdapterError: the adapter is malformed.
        ExportError: the destination overlaps the adapter, or the copy differs from it.
    """
    _refuse_overlap(destination, adapter)
    read_updates(adapter)
    sha256 = sha256_of_file(adapter / WEIGHTS)
    with atomic_folder(destination) as aside:
        for name in (WEIGHTS, CONFIG, IDENTITY):
            source = adapter / name
            if source.is_file():
                (aside / name).write_bytes(source.read_bytes())
        if sha256_of_file(aside / WEIGHTS) != sha256:
            raise ExportError(
                f"the copy of {adapter / WEIGHTS} differs from the original; check the disk and "
                "export again"
            )
    return sha256


def export_vllm(adapter: Path, destination: Path, *, max_rank: int) -> str:
    """Write an adapter that vLLM serves as it was trained; return the SHA-256 of its weights.

    All updates get scale 1 and one rank, the smallest of vLLM's that is large enough; PEFT can load
    the result too.

    Args:
        adapter: in PEFT's format, with or without rank_pattern, alpha_pattern and rsLoRA.
        destination: created or replaced.
        max_rank: the max_lora_rank that vLLM is started with.

    Raises:
        AdapterError: the adapter is malformed.
        ExportError: vLLM does not support a feature of the adapter, its rank exceeds `max_rank`, or
            the destination overlaps it.
    """
    _refuse_overlap(destination, adapter)
    _refuse_for_vllm(adapter)
    updates = read_updates(adapter)
    rank = _common_rank(updates, max_rank)
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        tensors |= _padded(name, update, rank)
    config = {
        **read_json(adapter / CONFIG),
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    with atomic_folder(destination) as aside:
        save_file(tensors, str(aside / WEIGHTS), metadata={"format": "pt"})
        write_json(aside / CONFIG, config)
        sha256 = sha256_of_file(aside / WEIGHTS)
        _write_identity(adapter, aside, tensors)
        _compare(load_file(str(aside / WEIGHTS)), tensors, destination)
    return sha256


def export_gguf(
    adapter: Path,
    destination: Path,
    *,
    base_config: Path,
    architecture: str = "llama",
) -> str:
    """Write an adapter as a float32 GGUF file for a base converted by llama.cpp.

    Args:
        adapter: in PEFT's format.
        destination: the file; created or replaced.
        base_config: config.json of the base, or its folder: it has the numbers of layers and heads.
        architecture: the base's architecture in GGUF: llama, qwen2 or qwen3.

    Returns:
        The SHA-256 of the file.

    Raises:
        AdapterError: the adapter is malformed.
        CheckpointError: `base_config` is missing or malformed.
        ExportError: llama.cpp has no tensor for a target, or the base has another architecture or
            other shapes.
    """
    _refuse_overlap(destination, adapter)
    base = read_base(base_config, architecture)
    updates = read_updates(adapter)
    alpha = float(read_config(adapter).lora_alpha)
    tensors = gguf_tensors(updates, base, alpha=alpha)
    with atomic_file(destination) as aside:
        write_gguf(aside, tensors, architecture, alpha)
        _compare(read_gguf(aside), tensors, destination)
        return sha256_of_file(aside)


def unsupported_by_vllm(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that are on and that vLLM does not support, with what they enable.

    Args:
        values: the content of adapter_config.json.
    """
    return {key: feature for key, feature in VLLM_UNSUPPORTED.items() if values.get(key) not in OFF}


def _refuse_overlap(destination: Path, adapter: Path) -> None:
    if overlap(destination, adapter):
        raise ExportError(
            f"{destination} overlaps {adapter}, which is read-only; choose another destination"
        )


def _refuse_for_vllm(adapter: Path) -> None:
    """Refuse an adapter with a feature that vLLM does not support."""
    values = read_json(adapter / CONFIG)
    for key, feature in unsupported_by_vllm(values).items():
        raise ExportError(
            f"{adapter / CONFIG} sets {key}={values[key]!r}, but vLLM does not support "
            f"{feature}; train without it, or export a merged model"
        )
    embeddings = sorted(key for key in read_tensors(adapter) if ".lora_embedding_" in key)
    if embeddings:
        raise ExportError(
            f"{adapter} adapts embeddings ({embeddings[0]}), which vLLM supports only for some "
            "architectures; leave them out, or export a merged model"
        )


def _common_rank(updates: Mapping[str, Update], max_rank: int) -> int:
    """Return the smallest rank of vLLM's that holds every update."""
    if max_rank not in VLLM_RANKS:
        raise ExportError(
            f"max_rank={max_rank} is not a max_lora_rank of vLLM; choose one of "
            f"{', '.join(map(str, VLLM_RANKS))}"
        )
    name = max(updates, key=lambda name: updates[name].rank)
    largest = updates[name].rank
    if largest > max_rank:
        raise ExportError(
            f"{name} has rank {largest}, but max_rank is {max_rank}; start vLLM with a larger "
            "max_lora_rank, or reduce the rank of the adapter"
        )
    return next(rank for rank in VLLM_RANKS if rank >= largest)


def _padded(name: str, update: Update, rank: int) -> dict[str, Tensor]:
    """Return A and s·B of one update with zero rows and columns up to `rank`."""
    missing = rank - update.rank
    rows = (0, 0, 0, missing)
    columns = (0, missing)
    a = update.a.float()
    b = update.scale * update.b.float()
    return {
        f"{PREFIX}{name}.lora_A.weight": F.pad(a, rows),
        f"{PREFIX}{name}.lora_B.weight": F.pad(b, columns),
    }


def _write_identity(adapter: Path, aside: Path, tensors: dict[str, Tensor]) -> None:
    """Copy the adapter's sidecar, if it has one, with the new digests and lineage."""
    identity = read_identity(adapter)
    if identity is None:
        return
    lineage = dict(identity.get("lineage", {}))
    lineage["exported_from"] = identity.get("adapter_sha256", "")
    digests = file_digests(aside, tensors)
    write_json(aside / IDENTITY, {**identity, "lineage": lineage, **digests})


def _compare(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    destination: Path,
) -> None:
    """Refuse a result whose tensors, read again, differ from those that were written."""
    different = found.keys() ^ expected.keys()
    for key in found.keys() & expected.keys():
        if not torch.equal(found[key], expected[key]):
            different.add(key)
    if different:
        raise ExportError(
            f"{min(different)} differs from what was written for {destination} when read again; "
            "check the disk and export again"
        )
