"""The three files of an adapter, read as untrusted input.

    adapter_model.safetensors   base_model.model.<module path>.lora_A.weight (r, in),
                                .lora_B.weight (out, r), …
    adapter_config.json         PEFT's fields, sorted
    adapter_identity.json       this library's sidecar: the base's digests, each file's digest,
                                lineage

Only safetensors and JSON are read; a pickle is refused.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_core.adapter.json_files import CONFIG, WEIGHTS
from lora_core.adapter.peft_keys import plain_keys
from lora_core.base.identity import VALUES, WeightSource, is_recorded
from lora_core.errors import AdapterError, BaseMismatchError
from lora_core.files import sha256_of_file


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read adapter_model.safetensors.

    Raises:
        AdapterError: the file is missing, damaged or a pickle.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{path} is missing; {_missing_weights_hint(folder)}")
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path} is damaged ({error}); fetch or train the adapter again"
        ) from error
    return plain_keys(tensors, str(path))


def _missing_weights_hint(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code: convert the folder with "
            "lora_core.convert_pickled_adapter"
        )
    return "give the folder of a saved adapter"


def file_digests(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the digests that the sidecar records: of both files and of each tensor."""
    return {
        "adapter_sha256": sha256_of_file(folder / WEIGHTS),
        "config_sha256": sha256_of_file(folder / CONFIG),
        "tensor_sha256": {key: tensor_digest(tensor) for key, tensor in tensors.items()},
    }


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def pattern_for(name: str, names: Collection[str]) -> str:
    """Return a key for rank_pattern or alpha_pattern that matches only `name` among `names`.

    PEFT matches the end of a module path and takes the first hit, and a file's keys are sorted.
    """
    ending = re.compile(rf"(.*\.)?({name})")
    matched = [other for other in names if ending.fullmatch(other)]
    return name if matched == [name] else f"^{re.escape(name)}"


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a tensor that is not floating-point or has values that are not finite."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(
                f"{key} of {where} is {tensor.dtype} of shape {tuple(tensor.shape)}, but it must "
                "be floating-point; fetch or train the adapter again"
            )
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(
                f"{key} of {where} has values that are not finite; train again with a lower "
                "learning rate"
            )


def check_digests(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse files that differ from the sidecar's digests; older sidecars record no config."""
    for file, key in ((WEIGHTS, "adapter_sha256"), (CONFIG, "config_sha256")):
        found = sha256_of_file(folder / file)
        recorded = identity.get(key)
        if recorded is None and key == "config_sha256":
            continue
        if found != recorded:
            raise AdapterError(
                f"{folder / file} has sha256 {found[:12]}…, but its sidecar records "
                f"{str(recorded)[:12]}…; fetch or train the adapter again"
            )


def check_fingerprint(base: WeightSource, *, adapter: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a base whose digests are not in the sidecar of the adapter.

    Args:
        base: the model or the folder.
        adapter: the adapter's folder, for the message.
        identity: the adapter's sidecar.
    """
    recorded = identity.get("base_digests", {})
    if not is_recorded(base, recorded):
        known = ", ".join(f"{kind} {_brief(value)}" for kind, value in sorted(recorded.items()))
        raise BaseMismatchError(
            f"{adapter} was trained on {identity.get('base') or 'an unnamed base'} "
            f"(fingerprints: {known or 'none'}), but this {base.kind} model has "
            f"{_brief(base.fingerprint)}; "
            "load that base, or pass check_base=False if you accept wrong outputs"
        )


def _brief(digest: str) -> str:
    return f"{digest.removeprefix(VALUES)[:12]}…"
