"""Merge an adapter into a checkpoint on disk, tensor by tensor, without building a model.

    base/model-0000x-of-….safetensors  ─→  W + s·B·A, formed in float32, rounded once
                                       ─→  the same file of destination/

Memory use is that of one tensor. The result equals, bit for bit, what `merge` and a save produce in
memory, including the head of a tied base. `checkpoint_plan.py` decides what is written.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.adapter.adapter_files import check_fingerprint
from lora_core.adapter.renaming import Rename
from lora_core.base.identity import FolderSource
from lora_core.base.weight_files import (
    CONFIG,
    INDEX,
    Checkpoint,
    Entry,
    Tensors,
    mapped_tensors,
    write_tensors,
)
from lora_core.errors import MergeError
from lora_core.files import atomic_folder, overlap, write_json
from lora_core.merging.checkpoint_plan import (
    CheckpointPlan,
    TensorUpdate,
    check_base_copies,
    plan_checkpoint,
)
from lora_core.merging.fidelity import Retention, measure_retention

OTHER_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
)
"""Suffixes of weight files that are not merged into: a copy would pass for the merged model."""


@dataclass(frozen=True)
class MergeReport:
    """What `merge_checkpoint` wrote."""

    retention: dict[str, Retention]
    """Module path → what the rounding retained of its update."""
    files: tuple[str, ...]
    """The weight files that were written."""
    left_out: tuple[str, ...]
    """Files of the base with weights in another format, which were not copied."""


def merge_checkpoint(
    base: Path,
    adapter: Path,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    renames: Sequence[Rename] = (),
) -> MergeReport:
    """Write to `destination` the checkpoint `base` with `adapter` merged into it.

    The folder appears complete or not at all. All other files of the base are copied.

    Args:
        base: a saved dense model, in one safetensors file or in shards with an index.
        adapter: a saved adapter in PEFT's format.
        destination: created or replaced; must not overlap either of the two.
        dtype: of every floating-point weight in the result; None keeps the dtype of each.
        check_base: refuse a base whose fingerprint differs from the adapter's sidecar.
        renames: how the names of weights in the base's files differ from those of the loaded model,
            in both directions; see `lora_core.adapter.renaming`.

    Raises:
        CheckpointError: the base is incomplete or quantized.
        AdapterError: the adapter is malformed, or has a feature that would be ignored here.
        BaseMismatchError: the adapter was trained on another base.
        MergeError: a target has no tensor or one of another shape, a sum does not fit its dtype,
            or the base may tie the target to another module in a way that is not recognized.
    """
    _refuse_overlap(destination, (base, adapter))
    plan = plan_checkpoint(base, adapter, dtype, renames)
    if check_base and plan.identity is not None:
        check_fingerprint(FolderSource(base), adapter=adapter, identity=plan.identity)
    check_base_copies(adapter, plan)
    with atomic_folder(destination) as folder:
        left_out = _copy_rest(plan.checkpoint, folder)
        retention = _write_weights(plan, folder)
        _write_metadata(plan, folder, dtype)
    return MergeReport(retention, tuple(plan.checkpoint.files), left_out)


def _refuse_overlap(destination: Path, sources: tuple[Path, ...]) -> None:
    for source in sources:
        if overlap(destination, source):
            raise MergeError(
                f"{destination} overlaps {source}, which is only read; "
                "choose a folder apart from it"
            )


def _write_weights(plan: CheckpointPlan, folder: Path) -> dict[str, Retention]:
    """Write every weight file; return the measurement of each update by module path."""
    retention: dict[str, Retention] = {}
    for file in plan.checkpoint.files:
        shard = plan.shard(file)  # contains the source of each copy in it
        with mapped_tensors(plan.checkpoint.folder, shard) as tensors:
            merged = _merged(tensors, shard, plan, retention)
            write_tensors(folder / file, shard, merged)
    return {step.module: retention[step.module] for step in plan.steps.values()}


def _merged(
    tensors: Tensors,
    shard: dict[str, Entry],
    plan: CheckpointPlan,
    retention: dict[str, Retention],
) -> Iterator[Tensor]:
    """Yield each tensor of one file in the form to write; add each update's measurement."""
    for name, entry in shard.items():
        weight = tensors[plan.source_of(name)]
        total = weight.to(entry.dtype)
        if name in plan.steps:
            step = plan.steps[name]
            total, retention[step.module] = _sum(weight, step, entry.dtype)
        if not torch.equal(torch.isfinite(total), torch.isfinite(weight)):
            raise MergeError(
                f"{name}: the merged weight is not finite in {entry.dtype}; "
                "pass dtype=torch.float32"
            )
        yield total


def _sum(weight: Tensor, step: TensorUpdate, dtype: torch.dtype) -> tuple[Tensor, Retention]:
    """Return W + s·B·A, formed in float32 and rounded once, and what the rounding retained."""
    delta = step.update.dense()
    if step.transposed:
        delta = delta.T
    base = weight.float()
    total = (base + delta).to(dtype)
    retention = measure_retention(delta, base=base, merged=total.float())
    return total, retention


def _copy_rest(checkpoint: Checkpoint, folder: Path) -> tuple[str, ...]:
    """Copy the files that hold no weights; return the weight files in other formats."""
    left_out = []
    for path in sorted(checkpoint.folder.rglob("*")):
        relative = path.relative_to(checkpoint.folder)
        name = str(relative)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if not path.is_file() or is_hidden or name in checkpoint.files:
            continue
        if _holds_other_weights(path, checkpoint):
            left_out.append(name)
            continue
        copy = folder / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return tuple(left_out)


def _holds_other_weights(path: Path, checkpoint: Checkpoint) -> bool:
    """Return whether a file holds weights in another format, or is an index of such files."""
    if path.suffix in OTHER_WEIGHTS:
        return True
    is_own_index = path.name == INDEX and checkpoint.index
    return path.name.endswith(".index.json") and not is_own_index


def _write_metadata(plan: CheckpointPlan, folder: Path, dtype: torch.dtype | None) -> None:
    """Write config.json, and the size and the tensor list of the index, if they change."""
    if dtype is None and not plan.untying.is_declared:
        return
    config = _config_with_dtype(plan.checkpoint.config, dtype)
    write_json(folder / CONFIG, plan.untying.updated_config(config))
    index = plan.checkpoint.index
    if index is not None:
        write_json(folder / INDEX, _updated_index(index, plan.entries))


def _updated_index(index: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the index with the total size and the tensors of the result."""
    total_size = sum(entry.bytes for entry in entries.values())
    return {
        **index,
        "metadata": {**index.get("metadata", {}), "total_size": total_size},
        "weight_map": {name: entry.file for name, entry in entries.items()},
    }


def _config_with_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Return config.json with the new dtype in it."""
    if dtype is None:
        return config
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    return {**config, key: name}
