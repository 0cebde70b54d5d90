"""Merge an adapter into a checkpoint on disk, tensor by tensor, without building a model.

    base/model-0000x-of-….safetensors  ─→  W + s·B·A, formed in float32, rounded once
                                       ─→  the same file of destination/

Memory use is that of one tensor. The result equals, bit for bit, what `merge` and a save produce in
memory, including the head of a tied base. See `layout.py` for weights that are stored as (in, out).
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.adapter.adapter_files import (
    PREFIX,
    check_fingerprint,
    read_identity,
    read_tensors,
)
from lora_core.base.identity import FolderSource
from lora_core.base.weight_files import (
    CONFIG,
    HEADS,
    INDEX,
    Checkpoint,
    Entry,
    Tensors,
    mapped_tensors,
    module_name,
    open_checkpoint,
    write_tensors,
)
from lora_core.errors import CheckpointError, MergeError
from lora_core.files import atomic_folder, overlap, write_json
from lora_core.merging.fidelity import Retention, measure_retention
from lora_core.merging.heads import Untying, plan_untying
from lora_core.merging.layout import WeightLayout, read_layout
from lora_core.spectrum.updates import BASE_COPY, Update, read_updates

OTHER_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
)
"""Suffixes of weight files that are not merged into: a copy would pass for the merged model."""
MERGEABLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MergeReport:
    """What `merge_checkpoint` wrote."""

    retention: dict[str, Retention]
    """Module path → what the rounding retained of its update."""
    files: tuple[str, ...]
    """The weight files that were written."""
    left_out: tuple[str, ...]
    """Files of the base with weights in another format, which were not copied."""


@dataclass(frozen=True)
class _TensorUpdate:
    """The update of one tensor."""

    module: str
    update: Update
    transposed: bool


def merge_checkpoint(
    base: Path,
    adapter: Path,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
) -> MergeReport:
    """Write to `destination` the checkpoint `base` with `adapter` merged into it.

    The folder appears complete or not at all. All other files of the base are copied.

    Args:
        base: a saved dense model, in one safetensors file or in shards with an index.
        adapter: a saved adapter in PEFT's format.
        destination: created or replaced; must not overlap either of the two.
        dtype: of every floating-point weight in the result; None keeps the dtype of each.
        check_base: refuse a base whose fingerprint differs from the adapter's sidecar.

    Raises:
        CheckpointError: the base is incomplete or quantized.
        AdapterError: the adapter is malformed, or has a feature that would be ignored here.
        BaseMismatchError: the adapter was trained on another base.
        MergeError: a target has no tensor or one of another shape, a sum does not fit its dtype,
            or the base may tie the target to another module in a way that is not recognized.
    """
    _refuse_overlap(destination, (base, adapter))
    checkpoint = open_checkpoint(base)
    updates = read_updates(adapter, embeddings=True)
    _refuse_quantized(checkpoint)
    untying = plan_untying(checkpoint, updates)
    checkpoint = _with_copies(checkpoint, untying)
    identity = read_identity(adapter)
    steps = _plan(checkpoint, updates, read_layout(adapter, identity, checkpoint))
    entries = _entries(checkpoint, dtype)
    if check_base and identity is not None:
        check_fingerprint(FolderSource(base), adapter=adapter, identity=identity)
    _check_base_copies(adapter, checkpoint, steps, untying)
    retention: dict[str, Retention] = {}
    with atomic_folder(destination) as temporary:
        left_out = _copy_rest(checkpoint, temporary)
        for file in checkpoint.files:
            shard = {name: entry for name, entry in entries.items() if entry.file == file}
            sources = {name: untying.copies.get(name, name) for name in shard}
            with mapped_tensors(base, shard) as tensors:
                merged = _merged(tensors, shard, sources=sources, steps=steps, retention=retention)
                write_tensors(temporary / file, shard, merged)
        if dtype is not None or untying.is_declared:
            config = untying.updated_config(_config_with_dtype(checkpoint.config, dtype))
            _write_metadata(checkpoint, entries, config, temporary)
    in_order = {step.module: retention[step.module] for step in steps.values()}
    return MergeReport(in_order, tuple(checkpoint.files), left_out)


def _refuse_overlap(destination: Path, sources: tuple[Path, ...]) -> None:
    for source in sources:
        if overlap(destination, source):
            raise MergeError(
                f"{destination} overlaps {source}, which is only read; "
                "choose a folder apart from it"
            )


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    if checkpoint.config.get("quantization_config"):
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG} has a quantization_config: "
            "rounded to its few bits again, most of a small update would be lost; "
            "merge into the checkpoint that it was made from"
        )


def _with_copies(checkpoint: Checkpoint, untying: Untying) -> Checkpoint:
    """Add the entries of the tensors that the result needs and the files lack."""
    copies = {name: checkpoint.entries[source] for name, source in untying.copies.items()}
    return replace(checkpoint, entries=checkpoint.entries | copies)


def _plan(
    checkpoint: Checkpoint, updates: dict[str, Update], layout: WeightLayout
) -> dict[str, _TensorUpdate]:
    """Return tensor name → the update to add to it."""
    steps = {}
    for module, update in updates.items():
        name = _tensor_name(module, checkpoint)
        entry = checkpoint.entries[name]
        _check_mergeable(module, update, entry)
        transposed = entry.shape != update.shape
        if update.shape[0] == update.shape[1]:
            transposed = update.embedding or layout.is_transposed(module, name)
        steps[name] = _TensorUpdate(module, update, transposed)
    return steps


def _tensor_name(module: str, checkpoint: Checkpoint) -> str:
    """Find the weight of `module` in the files.

    In a checkpoint of the model without its head, names lack their first part. A head can have
    another name in files than in the model.
    """
    candidates = [f"{module}.weight", f"{module.partition('.')[2]}.weight"]
    if module_name(module) in HEADS and checkpoint.stored_head is not None:
        candidates.append(checkpoint.stored_head)
    for name in candidates:
        if name in checkpoint.entries:
            return name
    raise MergeError(
        f"{checkpoint.folder} has no tensor {candidates[0]} for the target {module}; "
        "give the base the adapter was trained on"
    )


def _check_mergeable(module: str, update: Update, entry: Entry) -> None:
    """Refuse a weight of another dtype or shape than an update can be added to."""
    shape = update.shape
    if entry.dtype not in MERGEABLE:
        raise MergeError(
            f"the weight of {module} is stored as {entry.dtype}; "
            "merge into a base in float32, bfloat16 or float16"
        )
    if entry.shape not in (shape, shape[::-1]):
        raise MergeError(
            f"the update of {module} is {shape} and its weight {entry.shape}; "
            "give the base the adapter was trained on"
        )


def _check_base_copies(
    adapter: Path, checkpoint: Checkpoint, steps: dict[str, _TensorUpdate], untying: Untying
) -> None:
    """Refuse an adapter whose copy of a weight that it adapts differs from the base."""
    names = {
        f"{PREFIX}{step.module}{BASE_COPY}": untying.copies.get(name, name)
        for name, step in steps.items()
    }
    saved = read_tensors(adapter)
    copies = {name: saved[key] for key, name in names.items() if key in saved}
    entries = {name: checkpoint.entries[name] for name in copies}
    with mapped_tensors(checkpoint.folder, entries) as tensors:
        for name, copy in copies.items():
            if not torch.equal(copy.to(tensors[name].dtype), tensors[name]):
                raise MergeError(
                    f"{adapter} holds a base weight that is not {name} of {checkpoint.folder}; "
                    "give the base it was trained on"
                )


def _entries(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Entry]:
    """Return the entries of the result: widest dtype first, as safetensors aligns its tensors."""
    if dtype is not None and dtype not in MERGEABLE:
        raise MergeError(
            f"dtype={dtype} cannot hold a merged weight; use float32, bfloat16 or float16"
        )
    entries = dict(checkpoint.entries)
    if dtype is not None:
        for name, entry in checkpoint.entries.items():
            if entry.dtype.is_floating_point:
                entries[name] = replace(entry, dtype=dtype)
    return dict(sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _merged(
    tensors: Tensors,
    entries: dict[str, Entry],
    *,
    sources: dict[str, str],
    steps: dict[str, _TensorUpdate],
    retention: dict[str, Retention],
) -> Iterator[Tensor]:
    """Yield each tensor of one file in the form to write; add each update's measurement."""
    for name, entry in entries.items():
        weight = tensors[sources[name]]
        total = weight.to(entry.dtype)
        if name in steps:
            step = steps[name]
            total, retention[step.module] = _sum(weight, step, entry.dtype)
        if not torch.equal(torch.isfinite(total), torch.isfinite(weight)):
            raise MergeError(
                f"{name}: the merged weight is not finite in {entry.dtype}; "
                "pass dtype=torch.float32"
            )
        yield total


def _sum(weight: Tensor, step: _TensorUpdate, dtype: torch.dtype) -> tuple[Tensor, Retention]:
    """Return W + s·B·A, formed in float32 and rounded once, and what the rounding retained."""
    delta = step.update.dense()
    if step.transposed:
        delta = delta.T
    base = weight.float()
    total = (base + delta).to(dtype)
    return total, measure_retention(delta, base=base, merged=total.float())


def _copy_rest(checkpoint: Checkpoint, temporary: Path) -> tuple[str, ...]:
    """Copy the files that hold no weights; return the weight files in other formats."""
    left_out = []
    for path in sorted(checkpoint.folder.rglob("*")):
        relative = path.relative_to(checkpoint.folder)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if not path.is_file() or is_hidden or str(relative) in checkpoint.files:
            continue
        if _holds_other_weights(path, checkpoint):
            left_out.append(str(relative))
            continue
        copy = temporary / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return tuple(left_out)


def _holds_other_weights(path: Path, checkpoint: Checkpoint) -> bool:
    """Return whether a file holds weights in another format, or is an index of such files."""
    if path.suffix in OTHER_WEIGHTS:
        return True
    is_own_index = path.name == INDEX and checkpoint.index
    return path.name.endswith(".index.json") and not is_own_index


def _config_with_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Return config.json with the new dtype in it."""
    if dtype is None:
        return config
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: str(dtype).removeprefix("torch.")}


def _write_metadata(
    checkpoint: Checkpoint, entries: dict[str, Entry], config: dict[str, Any], folder: Path
) -> None:
    """Write the new config.json, and update the size and the tensor list of the index."""
    write_json(folder / CONFIG, config)
    if checkpoint.index is None:
        return
    metadata = dict(checkpoint.index.get("metadata", {}))
    metadata["total_size"] = sum(entry.bytes for entry in entries.values())
    weight_map = {name: entry.file for name, entry in entries.items()}
    index = {**checkpoint.index, "metadata": metadata, "weight_map": weight_map}
    write_json(folder / INDEX, index)
