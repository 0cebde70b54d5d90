"""Merge an adapter into a checkpoint on disk, tensor by tensor: no model is built, and memory is that of one tensor.

    base/model-0000x-of-….safetensors  ─→  W + s·B·A, formed in float32, rounded once  ─→  the same file of destination/

The result is, bit for bit, what `merge` and a save give in memory, the head of a tied base included. GPT-2's Conv1D
stores its weight as (in, out): the shapes of A and B say so, and where it is square, the adapter's `fan_in_fan_out`.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.adapter.adapter_files import CONFIG as ADAPTER_CONFIG
from lora_core.adapter.adapter_files import (
    PREFIX,
    check_fingerprint,
    read_identity,
    read_json,
    read_tensors,
)
from lora_core.base.identity import fingerprint_of_folder
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
from lora_core.files import folder_written_aside, overlap, write_json
from lora_core.merging.fidelity import Retention, kept
from lora_core.merging.heads import parting
from lora_core.spectrum.updates import BASE_COPY, Update, read_updates

OTHER_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
)
"""Endings of weight files that nobody merged into: copied, they would pass for the merged model."""
MERGEABLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MergeReport:
    """What `merge_checkpoint` has done."""

    kept: dict[str, Retention]
    """Module path → what the rounding kept of its update."""
    files: tuple[str, ...]
    """The weight files that were written."""
    left_out: tuple[str, ...]
    """Files of the base that hold weights in another form and were not copied."""


@dataclass(frozen=True)
class _Step:
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
        destination: created or replaced; must lie apart from both.
        dtype: of every floating weight in the result; None keeps each as it is.
        check_base: refuse a base whose fingerprint differs from the adapter's sidecar.

    Raises:
        CheckpointError: the base is incomplete or quantised.
        AdapterError: the adapter is malformed, or has a feature that would be ignored here.
        BaseMismatchError: the adapter was trained on another base.
        MergeError: a target has no tensor or one of another shape, a sum does not fit its dtype, or the base may tie the
            target to another module in a way that is not known here.
    """
    _refuse_overlap(destination, (base, adapter))
    checkpoint, updates = open_checkpoint(base), read_updates(adapter, embeddings=True)
    _refuse_quantised(checkpoint)
    parted = parting(checkpoint, updates)
    checkpoint = replace(
        checkpoint,
        entries=checkpoint.entries
        | {name: checkpoint.entries[one] for name, one in parted.copies.items()},
    )
    steps = _plan(checkpoint, updates, _stored_as_in_out(adapter))
    entries = _entries(checkpoint, steps, dtype)
    identity = read_identity(adapter)
    if check_base and identity is not None:
        check_fingerprint(fingerprint_of_folder(base), adapter, identity)
    _check_base_copies(adapter, checkpoint, steps)
    found: dict[str, Retention] = {}
    with folder_written_aside(destination) as aside:
        left_out = _copy_rest(checkpoint, aside)
        for file in checkpoint.files:
            part = {name: entry for name, entry in entries.items() if entry.file == file}
            with mapped_tensors(base, part) as tensors:
                sources = {name: parted.copies.get(name, name) for name in part}
                write_tensors(aside / file, part, _merged(tensors, part, sources, steps, found))
        if dtype is not None or parted.is_told:
            _declare(checkpoint, entries, parted.config(_declared(checkpoint.config, dtype)), aside)
    return MergeReport(
        {step.module: found[step.module] for step in steps.values()},
        tuple(checkpoint.files),
        left_out,
    )


def _stored_as_in_out(adapter: Path) -> bool:
    """Tell whether the adapter says that its targets store their weights as (in, out)."""
    return bool(read_json(adapter / ADAPTER_CONFIG).get("fan_in_fan_out"))


def _refuse_overlap(destination: Path, sources: tuple[Path, ...]) -> None:
    for source in sources:
        if overlap(destination, source):
            raise MergeError(
                f"{destination} overlaps {source}, which is only read; choose a folder apart from it"
            )


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    if checkpoint.config.get("quantization_config"):
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG} has a quantization_config: rounded to its few bits again, most of a small update would be lost; "
            "merge into the checkpoint that it was made from"
        )


def _plan(
    checkpoint: Checkpoint, updates: dict[str, Update], fan_in_fan_out: bool
) -> dict[str, _Step]:
    """Return tensor name → what is added to it."""
    steps = {}
    for module, update in updates.items():
        name = _tensor_name(module, checkpoint)
        steps[name] = _Step(
            module, update, _is_transposed(module, update, checkpoint.entries[name], fan_in_fan_out)
        )
    return steps


def _tensor_name(module: str, checkpoint: Checkpoint) -> str:
    """Find the weight of `module`: a checkpoint of the model without its head has names without their first part.

    A head may be called otherwise in files than in the model.
    """
    candidates = (
        f"{module}.weight",
        f"{module.partition('.')[2]}.weight",
        checkpoint.stored_head if module_name(module) in HEADS else None,
    )
    found = next((name for name in candidates if name in checkpoint.entries), None)
    if found is None:
        raise MergeError(
            f"{checkpoint.folder} has no tensor {candidates[0]} for the target {module}; give the base the adapter was trained on"
        )
    return found


def _is_transposed(module: str, update: Update, entry: Entry, fan_in_fan_out: bool) -> bool:
    shape = update.shape
    if entry.dtype not in MERGEABLE:
        raise MergeError(
            f"the weight of {module} is stored as {entry.dtype}; merge into a base in float32, bfloat16 or float16"
        )
    if entry.shape not in (shape, shape[::-1]):
        raise MergeError(
            f"the update of {module} is {shape} and its weight {entry.shape}; give the base the adapter was trained on"
        )
    return entry.shape != shape or (shape[0] == shape[1] and (fan_in_fan_out or update.embedding))


def _check_base_copies(adapter: Path, checkpoint: Checkpoint, steps: dict[str, _Step]) -> None:
    """Refuse an adapter that brings another weight of an adapted embedding than the base has."""
    adapted = {
        f"{PREFIX}{step.module}{BASE_COPY}": name
        for name, step in steps.items()
        if step.update.embedding
    }
    brought = {
        name: one
        for key, one in (read_tensors(adapter) if adapted else {}).items()
        if (name := adapted.get(key)) is not None
    }
    with mapped_tensors(
        checkpoint.folder, {name: checkpoint.entries[name] for name in brought}
    ) as tensors:
        for name, copy in brought.items():
            if not torch.equal(copy.to(tensors[name].dtype), tensors[name]):
                raise MergeError(
                    f"{adapter} holds a base weight that is not {name} of {checkpoint.folder}; give the base it was trained on"
                )


def _entries(
    checkpoint: Checkpoint, steps: dict[str, _Step], dtype: torch.dtype | None
) -> dict[str, Entry]:
    """Return what is written: widest dtype first, as safetensors aligns its tensors."""
    if dtype is not None and dtype not in MERGEABLE:
        raise MergeError(
            f"dtype={dtype} cannot hold a merged weight; use float32, bfloat16 or float16"
        )
    entries = {
        name: replace(entry, dtype=dtype)
        if dtype is not None and entry.dtype.is_floating_point
        else entry
        for name, entry in checkpoint.entries.items()
    }
    return dict(sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _merged(
    tensors: Tensors,
    entries: dict[str, Entry],
    sources: dict[str, str],
    steps: dict[str, _Step],
    found: dict[str, Retention],
) -> Iterator[Tensor]:
    """Yield each tensor of one file as it is written; what was kept of each update goes into `found`."""
    for name, entry in entries.items():
        weight = tensors[sources[name]]
        total = weight.to(entry.dtype)
        if name in steps:
            total, found[steps[name].module] = _sum(weight, steps[name], entry.dtype)
        if not torch.equal(torch.isfinite(total), torch.isfinite(weight)):
            raise MergeError(
                f"{name}: the merged weight is not finite in {entry.dtype}; pass dtype=torch.float32"
            )
        yield total


def _sum(weight: Tensor, step: _Step, dtype: torch.dtype) -> tuple[Tensor, Retention]:
    """Return W + s·B·A, formed in float32 and rounded once, and what the rounding kept."""
    delta = step.update.dense().T if step.transposed else step.update.dense()
    base = weight.float()
    total = (base + delta).to(dtype)
    return total, kept(delta, base=base, merged=total.float())


def _copy_rest(checkpoint: Checkpoint, aside: Path) -> tuple[str, ...]:
    """Copy what is no weight; return the weight files in other forms, which are left where they are."""
    left_out = []
    for path in sorted(checkpoint.folder.rglob("*")):
        inner = path.relative_to(checkpoint.folder)
        if (
            not path.is_file()
            or any(part.startswith(".") for part in inner.parts)
            or str(inner) in checkpoint.files
        ):
            continue
        if path.suffix in OTHER_WEIGHTS or (
            path.name.endswith(".index.json") and not (path.name == INDEX and checkpoint.index)
        ):
            left_out.append(str(inner))
            continue
        (aside / inner).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, aside / inner)
    return tuple(left_out)


def _declared(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Return config.json with the new dtype in it."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return config if dtype is None else {**config, key: str(dtype).removeprefix("torch.")}


def _declare(
    checkpoint: Checkpoint, entries: dict[str, Entry], config: dict[str, Any], aside: Path
) -> None:
    """Write the new config.json, and into the index the new size and what tensors there are."""
    write_json(aside / CONFIG, config)
    if checkpoint.index is not None:
        metadata = {
            **checkpoint.index.get("metadata", {}),
            "total_size": sum(entry.bytes for entry in entries.values()),
        }
        places = {name: entry.file for name, entry in entries.items()}
        write_json(aside / INDEX, {**checkpoint.index, "metadata": metadata, "weight_map": places})
