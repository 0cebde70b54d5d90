"""Write updates as a PEFT adapter that is derived from another one.

The settings and the sidecar are those of the source, with the ranks, scales and modules of the
updates and with the operation in the sidecar's lineage.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.adapter.adapter_files import check_values, pattern_for, read_tensors
from lora_core.adapter.json_files import CONFIG, PREFIX, WEIGHTS, read_identity, read_json
from lora_core.adapter.peft_config import read_config
from lora_core.adapter.rewriting import write_adapter
from lora_core.errors import AdapterError
from lora_core.files import sha256_of_file
from lora_core.spectrum.updates import Update, module_paths, without_base_copies

NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings that exclude some of the modules that target_modules names."""


def write_updates(
    folder: Path,
    updates: Mapping[str, Update],
    *,
    like: Path,
    derived_by: str,
    parents: Sequence[Path] = (),
) -> str:
    """Write `updates` as a PEFT adapter; return the SHA-256 of its weights file.

    The scale is written as alpha/r, even if `like` uses alpha/√r. rank_pattern and alpha_pattern
    list the layers whose rank or alpha differs from those of the widest layer; vLLM ignores both.

    Args:
        folder: created or replaced; it appears complete or not at all.
        updates: module path → update.
        like: the adapter whose settings and sidecar are copied; without a sidecar none is written.
        derived_by: the operation, such as `truncated to rank 4`, for the sidecar's lineage.
        parents: the source adapters, which the lineage lists by digest; the default is `like`.

    Raises:
        AdapterError: there is nothing to write, a value is not finite, or `like` cannot be read.
    """
    if not updates:
        raise AdapterError(f"there is no update to write to {folder}; give at least one")
    tensors = _tensors(updates)
    check_values(tensors, "the updates")
    config = _peft_config(updates, like)
    identity = read_identity(like)
    history = _history(derived_by, parents or [like])
    if identity is not None:
        identity = {**identity, "lineage": {**identity.get("lineage", {}), **history}}
    return write_adapter(folder, tensors, values=config, identity=identity)


def _history(derived_by: str, parents: Sequence[Path]) -> dict[str, str]:
    """Return the operation and the digests of the source adapters, for the lineage."""
    digests = [sha256_of_file(parent / WEIGHTS) for parent in parents]
    return {
        "derived_by": derived_by,
        "derived_from": ", ".join(digests),
    }


def _tensors(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Return the factors under PEFT's keys, in float32 in memory of the host."""
    tensors = {}
    for name, update in updates.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = update.a.detach().to("cpu", torch.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = update.b.detach().to("cpu", torch.float32)
    return tensors


def _peft_config(updates: Mapping[str, Update], like: Path) -> dict[str, Any]:
    """Return the settings of `like` with the ranks, scales and modules of `updates`."""
    read_config(like)
    config = read_json(like / CONFIG)
    if updates.keys() != _updated_modules(like):
        config |= {key: None for key in NARROWING if key in config}
        config |= {"target_modules": sorted(updates)}
    widest = max(updates.values(), key=lambda update: update.rank)
    common_alpha = _alpha(widest)
    rank_pattern = {}
    alpha_pattern = {}
    for name, update in updates.items():
        alpha = _alpha(update)
        if update.rank != widest.rank:
            rank_pattern[pattern_for(name, updates)] = update.rank
        if alpha != common_alpha:
            alpha_pattern[pattern_for(name, updates)] = alpha
    return {
        **config,
        "r": widest.rank,
        "lora_alpha": common_alpha,
        "use_rslora": False,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "inference_mode": True,
    }


def _updated_modules(folder: Path) -> set[str]:
    """Return the paths of the modules that the adapter of `folder` updates."""
    tensors = without_base_copies(read_tensors(folder))
    return set(module_paths(tensors, folder))


def _alpha(update: Update) -> float:
    """Return the alpha of an update's scale, as an integer if it is one."""
    alpha = update.scale * update.rank
    return int(alpha) if alpha.is_integer() else alpha
