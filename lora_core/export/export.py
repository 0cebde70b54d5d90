"""An adapter for other programs: unchanged for PEFT, flattened for vLLM, as GGUF for llama.cpp, or merged.

Each export says the same ΔW = s·B·A in the words of one reader, and refuses what that reader would misread:

    vLLM        knows one rank and one scale and ignores rank_pattern and alpha_pattern, so every update is padded with
                zeros to one rank, and its scale goes into B.
    llama.cpp   scales an update by alpha / (rank of its tensor), and stores q and k of a Llama with the two halves of
                each head interleaved, so their B is reordered likewise.

What was written is read again and compared before it takes its place.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from lora_core.adapter.adapter_files import (
    CONFIG,
    IDENTITY,
    PREFIX,
    WEIGHTS,
    file_digests,
    read_identity,
    read_json,
    read_tensors,
)
from lora_core.errors import ExportError
from lora_core.export.gguf import base_values, gguf_tensors, read_gguf, write_gguf
from lora_core.files import (
    file_written_aside,
    folder_written_aside,
    overlap,
    sha256_of_file,
    write_json,
)
from lora_core.merging.streaming import merge_checkpoint
from lora_core.spectrum.updates import Update, read_updates

export_merged = merge_checkpoint

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for its max_lora_rank; newer versions take 1 as well, which saves nothing here."""
VLLM_LACKS = {
    "use_dora": "DoRA",
    "modules_to_save": "modules trained whole",
    "bias": "trained biases",
    "lora_bias": "bias in B",
    "trainable_token_indices": "trained token rows",
}


def export_peft(adapter: Path, destination: Path) -> str:
    """Copy an adapter as it is, having read all of it; return the SHA-256 of its weights.

    Raises:
        AdapterError: the adapter is malformed.
        ExportError: the destination overlaps the adapter, or the copy differs from it.
    """
    _refuse_overlap(destination, adapter)
    read_updates(adapter)
    sha256 = sha256_of_file(adapter / WEIGHTS)
    with folder_written_aside(destination) as aside:
        for name in (WEIGHTS, CONFIG, IDENTITY):
            if (adapter / name).is_file():
                (aside / name).write_bytes((adapter / name).read_bytes())
        if sha256_of_file(aside / WEIGHTS) != sha256:
            raise ExportError(
                f"the copy of {adapter / WEIGHTS} differs from it; check the disk and export again"
            )
    return sha256


def export_vllm(adapter: Path, destination: Path, *, max_rank: int) -> str:
    """Write an adapter that vLLM serves as it was trained; return the SHA-256 of its weights.

    All updates get the smallest rank of vLLM's list that holds the largest, and the scale 1; PEFT reads it as well.

    Args:
        adapter: in PEFT's format, with rank_pattern, alpha_pattern or rsLoRA as may be.
        destination: created or replaced.
        max_rank: the max_lora_rank that vLLM is started with.

    Raises:
        AdapterError: the adapter is malformed.
        ExportError: vLLM lacks a feature of the adapter, its rank exceeds `max_rank`, or the destination overlaps it.
    """
    _refuse_overlap(destination, adapter)
    _refuse_for_vllm(adapter)
    updates = read_updates(adapter)
    rank = _common_rank(updates, max_rank)
    tensors = {
        key: tensor
        for name, update in updates.items()
        for key, tensor in _padded(name, update, rank).items()
    }
    config = {
        **read_json(adapter / CONFIG),
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    with folder_written_aside(destination) as aside:
        save_file(tensors, str(aside / WEIGHTS), metadata={"format": "pt"})
        write_json(aside / CONFIG, config)
        sha256 = sha256_of_file(aside / WEIGHTS)
        _write_identity(adapter, aside, tensors)
        _compare(load_file(str(aside / WEIGHTS)), tensors, destination)
    return sha256


def export_gguf(
    adapter: Path, destination: Path, *, base_config: Path, architecture: str = "llama"
) -> str:
    """Write an adapter as a GGUF file in float32, for a base converted by llama.cpp; return the file's SHA-256.

    Args:
        adapter: in PEFT's format.
        destination: the file; created or replaced.
        base_config: config.json of the base, or its folder: it holds the numbers of layers and heads.
        architecture: what the base is called in GGUF: llama, qwen2 or qwen3.

    Raises:
        AdapterError: the adapter is malformed.
        CheckpointError: `base_config` is missing or malformed.
        ExportError: llama.cpp has no tensor for a target, or the base is of another architecture or other shapes.
    """
    _refuse_overlap(destination, adapter)
    base, updates = base_values(base_config, architecture), read_updates(adapter)
    alpha = float(read_json(adapter / CONFIG)["lora_alpha"])
    tensors = gguf_tensors(updates, base, architecture, alpha=alpha)
    with file_written_aside(destination) as aside:
        write_gguf(aside, tensors, architecture, alpha)
        _compare(read_gguf(aside), tensors, destination)
        return sha256_of_file(aside)


def _refuse_overlap(destination: Path, adapter: Path) -> None:
    if overlap(destination, adapter):
        raise ExportError(
            f"{destination} overlaps {adapter}, which is only read; choose a place apart from it"
        )


def _refuse_for_vllm(adapter: Path) -> None:
    values = read_json(adapter / CONFIG)
    for key, what in VLLM_LACKS.items():
        if values.get(key) not in (None, False, "none", [], {}):
            raise ExportError(
                f"{adapter / CONFIG} sets {key}={values[key]!r} and vLLM has no {what}; train without, or export a merged model"
            )
    embeddings = sorted(key for key in read_tensors(adapter) if ".lora_embedding_" in key)
    if embeddings:
        raise ExportError(
            f"{adapter} adapts embeddings ({embeddings[0]}), which vLLM serves for some architectures alone; leave them out, or export a "
            "merged model"
        )


def _common_rank(updates: Mapping[str, Update], max_rank: int) -> int:
    if max_rank not in VLLM_RANKS:
        raise ExportError(
            f"max_rank={max_rank} is no max_lora_rank of vLLM; choose one of {', '.join(map(str, VLLM_RANKS))}"
        )
    name, largest = max(
        ((name, update.rank) for name, update in updates.items()), key=lambda item: item[1]
    )
    if largest > max_rank:
        raise ExportError(
            f"{name} has rank {largest} and max_rank is {max_rank}; start vLLM with more, or reduce the rank of the adapter"
        )
    return next(rank for rank in VLLM_RANKS if rank >= largest)


def _padded(name: str, update: Update, rank: int) -> dict[str, Tensor]:
    """Return A and s·B of one update with zero rows and columns up to `rank`."""
    missing = rank - update.rank
    a, b = update.a.float(), update.scale * update.b.float()
    return {
        f"{PREFIX}{name}.lora_A.weight": F.pad(a, (0, 0, 0, missing)),
        f"{PREFIX}{name}.lora_B.weight": F.pad(b, (0, missing)),
    }


def _write_identity(adapter: Path, aside: Path, tensors: dict[str, Tensor]) -> None:
    """Hand on what the adapter was trained on, where that is known."""
    identity = read_identity(adapter)
    if identity is not None:
        lineage = {
            **identity.get("lineage", {}),
            "exported_from": identity.get("adapter_sha256", ""),
        }
        write_json(
            aside / IDENTITY, {**identity, "lineage": lineage, **file_digests(aside, tensors)}
        )


def _compare(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], destination: Path
) -> None:
    different = [
        key
        for key in found.keys() | expected.keys()
        if key not in found or key not in expected or not torch.equal(found[key], expected[key])
    ]
    if different:
        raise ExportError(
            f"{min(different)}, read again, is not what was written for {destination}; check the disk and export again"
        )
