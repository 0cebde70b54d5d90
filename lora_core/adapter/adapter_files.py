"""The three files of an adapter, read without trust.

    adapter_model.safetensors   base_model.model.<module path>.lora_A.weight (r, in), .lora_B.weight (out, r), …
    adapter_config.json         PEFT's fields, sorted
    adapter_identity.json       ours: the base's digests, each file's digest, lineage

Only safetensors and JSON are read; a pickle is refused.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_core.errors import AdapterError, BaseMismatchError
from lora_core.files import sha256_of_file

WEIGHTS, CONFIG, IDENTITY = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "adapter_identity.json",
)
PREFIX = "base_model.model."
TEXTS = ("base", "revision", "adapter_sha256", "config_sha256")
OBJECTS = ("base_digests", "lineage", "tensor_sha256")
"""What the sidecar's keys hold, where they are there."""


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read adapter_model.safetensors; raises AdapterError when it is missing, damaged or a pickle."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
        hint = "give the folder of a saved adapter"
        if pickles:
            hint = f"{pickles[0]} is a pickle, which can run code: convert it to safetensors"
        raise AdapterError(f"{path} is missing; {hint}")
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path} is damaged ({error}); fetch or train the adapter again"
        ) from error


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Read the sidecar; None where the adapter was not written by this library.

    Raises:
        AdapterError: it is malformed, or a key holds what does not belong there.
    """
    path = folder / IDENTITY
    if not path.is_file():
        return None
    values = read_json(path)
    for key, kind, what in (
        *((key, str, "text") for key in TEXTS),
        *((key, dict, "an object") for key in OBJECTS),
    ):
        if not isinstance(values.get(key, kind()), kind) and not (
            kind is str and values[key] is None
        ):
            raise AdapterError(
                f"{path} has {key}={values[key]!r}, where {what} belongs; fetch or train the adapter again"
            )
    for kind_of_storage, digest in values.get("base_digests", {}).items():
        if not isinstance(digest, str):
            raise AdapterError(
                f"{path} has the {kind_of_storage} digest {digest!r}, where text belongs; fetch or train the adapter again"
            )
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of one JSON object; raises AdapterError when it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing; give the folder of a saved adapter") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path} cannot be read ({error}); fetch or train the adapter again"
        ) from error
    if not isinstance(value, dict):
        raise AdapterError(
            f"{path} holds {type(value).__name__} where an object belongs; fetch or train the adapter again"
        )
    return value


def file_digests(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the sidecar keeps of the two files beside it and of each tensor."""
    return {
        "adapter_sha256": sha256_of_file(folder / WEIGHTS),
        "config_sha256": sha256_of_file(folder / CONFIG),
        "tensor_sha256": {key: tensor_digest(tensor) for key, tensor in tensors.items()},
    }


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def pattern_for(name: str, names: Collection[str]) -> str:
    """Return a key of rank_pattern or alpha_pattern that decides for `name` alone among `names`.

    PEFT matches the end of a module path and takes the first hit, and a file's keys are sorted.
    """
    ending = re.compile(rf"(.*\.)?({name})")
    return (
        name
        if [other for other in names if ending.fullmatch(other)] == [name]
        else f"^{re.escape(name)}"
    )


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a tensor that holds no floats or what is not finite."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(
                f"{key} of {where} is {tensor.dtype} of shape {tuple(tensor.shape)}; floats belong there"
            )
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(
                f"{key} of {where} holds values that are not finite; train again with a lower learning rate"
            )


def check_digests(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse files that are not those the sidecar was written for; sidecars of old know the weights alone."""
    for file, key in ((WEIGHTS, "adapter_sha256"), (CONFIG, "config_sha256")):
        found, recorded = sha256_of_file(folder / file), identity.get(key)
        if found != recorded and not (recorded is None and key == "config_sha256"):
            raise AdapterError(
                f"{folder / file} has sha256 {found[:12]}… but its sidecar says {str(recorded)[:12]}…; fetch or train the adapter again"
            )


def check_fingerprint(found: tuple[str, str], folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a base whose kind of storage and digest are not among those of the sidecar of the adapter in `folder`."""
    kind, digest = found
    recorded = identity.get("base_digests", {})
    if recorded.get(kind) != digest:
        known = ", ".join(f"{k} {v[:12]}…" for k, v in sorted(recorded.items())) or "none"
        raise BaseMismatchError(
            f"{folder} was trained on {identity.get('base') or 'an unnamed base'} (fingerprints: {known}), "
            f"but this {kind} model has {digest[:12]}…; load that base, or pass check_base=False if you accept wrong answers"
        )
