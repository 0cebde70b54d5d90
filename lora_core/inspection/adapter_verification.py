"""Whether an adapter's files are intact, complete, finite, and of the base that is there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.adapter.adapter_files import check_digests, tensor_digest
from lora_core.adapter.contents import AdapterContents, read_contents
from lora_core.adapter.renaming import Rename
from lora_core.errors import AdapterError
from lora_core.inspection.damage import find_damage
from lora_core.merging.adapted_weights import check_base

NO_SIDECAR = "not recorded: the adapter has no sidecar"
NO_BASE = "not checked: no base was given or found"


@dataclass(frozen=True)
class Verification:
    """What was verified about an adapter; damage is an error instead."""

    folder: str
    files: str
    """How the digests of the files compare with the sidecar."""
    values: str
    """What was found about the tensors."""
    base: str
    """How the base compares with the one it was trained on."""


def verify_adapter(
    folder: Path, base: Path | None = None, renames: Sequence[Rename] = ()
) -> Verification:
    """Check an adapter's files, values, structure and base.

    Args:
        folder: of an adapter in PEFT's format, with or without a sidecar.
        base: folder of the dense base; None leaves it out.
        renames: see `merge_checkpoint`.

    Raises:
        AdapterError: a digest differs from the sidecar, or the adapter is damaged or not
            supported.
        BaseMismatchError: the adapter was trained on another base.
        MergeError: the base lacks a target, or has it in another shape.
        CheckpointError: the base is incomplete or quantized.
    """
    contents = read_contents(folder)
    files = _verify_digests(contents)
    for anomaly in find_damage(contents):
        if anomaly.is_damage:
            raise AdapterError(f"{folder} cannot be used as it is: {anomaly.text}")
    updates = len(contents.factors)
    values = f"{len(contents.tensors)} tensors of {updates} updates are complete and finite"
    values = "; ".join([values, *contents.changes])
    return Verification(
        folder=str(folder),
        files=files,
        values=values,
        base=NO_BASE if base is None else check_base(contents, base, renames),
    )


def _verify_digests(contents: AdapterContents) -> str:
    """Compare the files and each tensor with the sidecar."""
    identity = contents.identity
    if identity is None:
        return NO_SIDECAR
    check_digests(contents.folder, identity)
    recorded: Mapping[str, Any] = identity.get("tensor_sha256", {})
    for key, digest in recorded.items():
        tensor = contents.tensors.get(key)
        if tensor is None or tensor_digest(tensor) != digest:
            raise AdapterError(
                f"{key} of {contents.file} is not the tensor that its sidecar records; "
                "fetch or train the adapter again"
            )
    return f"both files and {len(recorded)} tensors have the digests of the sidecar"
