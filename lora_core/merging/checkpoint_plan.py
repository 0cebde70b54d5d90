"""What a merge on disk writes, planned and checked from headers before anything is written.

Each update belongs to one tensor of the files, or to the copy of a tied weight that the files lack
(see `heads.py`). A tensor is stored as (out, in), or as (in, out) (see `layout.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_core.adapter.adapter_files import read_tensors
from lora_core.adapter.json_files import PREFIX, read_identity
from lora_core.adapter.renaming import Rename
from lora_core.base.weight_files import (
    CONFIG,
    HEADS,
    Checkpoint,
    Entry,
    mapped_tensors,
    module_name,
    open_checkpoint,
)
from lora_core.errors import CheckpointError, MergeError
from lora_core.merging.heads import MERGE_IN_MEMORY, Untying, plan_untying
from lora_core.merging.layout import WeightLayout, read_layout
from lora_core.spectrum.updates import BASE_COPY, Update, read_updates

MERGEABLE = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes to which a sum is rounded."""


@dataclass(frozen=True)
class TensorUpdate:
    """The update of one tensor of a checkpoint."""

    module: str
    """Path of the module whose weight the tensor is."""
    update: Update
    transposed: bool
    """The tensor is stored as (in, out)."""


@dataclass(frozen=True)
class CheckpointPlan:
    """The tensors of a merged checkpoint and how each is computed."""

    checkpoint: Checkpoint
    """The base, with an entry for each tensor that its files lack and the result needs."""
    identity: dict[str, Any] | None
    """The adapter's sidecar, if it has one."""
    steps: Mapping[str, TensorUpdate]
    """Tensor name → the update to add to it; other tensors are copied."""
    entries: Mapping[str, Entry]
    """Tensor name → its file, shape and dtype in the result, in the order to write."""
    untying: Untying
    """What changes in the tie between head and embedding."""

    def source_of(self, name: str) -> str:
        """Return the tensor of the base that the tensor `name` of the result comes from."""
        return self.untying.copies.get(name, name)

    def shard(self, file: str) -> dict[str, Entry]:
        """Return the entries of one file of the result, in the order to write."""
        return {name: entry for name, entry in self.entries.items() if entry.file == file}


def plan_checkpoint(
    base: Path,
    adapter: Path,
    dtype: torch.dtype | None,
    renames: Sequence[Rename] = (),
) -> CheckpointPlan:
    """Read the headers of `base` and the adapter, and plan the merged checkpoint.

    Args:
        base: a saved dense model.
        adapter: a saved adapter in PEFT's format.
        dtype: of every floating-point weight in the result; None keeps the dtype of each.
        renames: from names of weights in a model to their names in files; a name that the files
            have is not renamed.

    Raises:
        CheckpointError: the base is incomplete or quantized.
        AdapterError: the adapter is malformed, or has a feature that would be ignored here.
        MergeError: a target has no tensor or one of another dtype or shape, `dtype` cannot hold a
            sum, or the layout or the ties of a weight are not known.
    """
    checkpoint = open_checkpoint(base)
    updates = read_updates(adapter, embeddings=True)
    _refuse_quantized(checkpoint)
    untying = plan_untying(checkpoint, updates)
    checkpoint = _with_copies(checkpoint, untying)
    identity = read_identity(adapter)
    layout = read_layout(adapter, identity, checkpoint)
    return CheckpointPlan(
        checkpoint=checkpoint,
        identity=identity,
        steps=_plan_steps(checkpoint, updates, layout, renames),
        entries=_entries(checkpoint, dtype),
        untying=untying,
    )


def check_base_copies(adapter: Path, plan: CheckpointPlan) -> None:
    """Refuse an adapter whose copy of a weight that it adapts differs from the base.

    Args:
        adapter: its folder; PEFT saves such a copy with an embedding or a head.
        plan: of the merge.

    Raises:
        MergeError: a copy differs.
    """
    checkpoint = plan.checkpoint
    saved = read_tensors(adapter)
    copies = {}
    for name, step in plan.steps.items():
        key = f"{PREFIX}{step.module}{BASE_COPY}"
        if key in saved:
            copies[plan.source_of(name)] = saved[key]
    entries = {name: checkpoint.entries[name] for name in copies}
    with mapped_tensors(checkpoint.folder, entries) as tensors:
        for name, copy in copies.items():
            weight = tensors[name]
            if not torch.equal(copy.to(weight.dtype), weight):
                raise MergeError(
                    f"{adapter} holds a base weight that is not {name} of {checkpoint.folder}; "
                    "give the base it was trained on"
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
    entries = dict(checkpoint.entries)
    for name, source in untying.copies.items():
        entries[name] = checkpoint.entries[source]
    return replace(checkpoint, entries=entries)


def _plan_steps(
    checkpoint: Checkpoint,
    updates: Mapping[str, Update],
    layout: WeightLayout,
    renames: Sequence[Rename],
) -> dict[str, TensorUpdate]:
    """Return tensor name → the update to add to it."""
    steps: dict[str, TensorUpdate] = {}
    for module, update in updates.items():
        name = _tensor_name(module, checkpoint, renames)
        if name in steps:
            raise MergeError(
                f"{module} and {steps[name].module} both update {name} of {checkpoint.folder}; "
                "save the adapter again under one of the two names"
            )
        entry = checkpoint.entries[name]
        _check_mergeable(module, update, entry)
        out_features, in_features = update.shape
        if out_features != in_features:
            transposed = entry.shape != update.shape
        else:
            transposed = update.embedding or layout.is_transposed(module, name)
        steps[name] = TensorUpdate(module, update, transposed)
    return steps


def _tensor_name(module: str, checkpoint: Checkpoint, renames: Sequence[Rename]) -> str:
    """Find the weight of `module` in the files.

    In a checkpoint of the model without its head, names lack their first part. A head can have
    another name in files than in the model.
    """
    without_first_part = module.partition(".")[2]
    candidates = [f"{module}.weight", f"{without_first_part}.weight"]
    for rename in renames:
        candidates += [rename(name) for name in candidates[:2]]
    if module_name(module) in HEADS and checkpoint.stored_head is not None:
        candidates.append(checkpoint.stored_head)
    for name in candidates:
        if name in checkpoint.entries:
            return name
    missing = f"{checkpoint.folder} has no tensor {candidates[0]} for the target {module}"
    if checkpoint.head_is_tied:
        missing += ", and its config.json ties the output head to an embedding"
    raise MergeError(
        f"{missing}: it is another base than the adapter's, or the target is a tied head, or the "
        "files have former names of the modules and no renames are given; give the base the "
        f"adapter was trained on, or load both, {MERGE_IN_MEMORY}"
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
    by_name = sorted(entries)
    widest_first = sorted(by_name, key=lambda name: -entries[name].dtype.itemsize)
    return {name: entries[name] for name in widest_first}
