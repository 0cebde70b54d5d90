"""The names of an adapter's files and keys, and its JSON files, read as untrusted input.

Imports no torch: a run reads them in its main process.
"""

import json
from pathlib import Path
from typing import Any

from lora_core.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
IDENTITY = "adapter_identity.json"
PREFIX = "base_model.model."
STRING_KEYS = ("base", "revision", "adapter_sha256", "config_sha256")
"""Optional sidecar keys whose value is a string or null."""
OBJECT_KEYS = ("base_digests", "lineage", "tensor_sha256")
"""Optional sidecar keys whose value is an object."""
TRANSPOSED = "transposed_modules"
"""Optional sidecar key: the modules of the base that store their weight as (in, out)."""

ZERO_UPDATES = "zero_updates"
"""Optional sidecar key: the factors that training left at zero next to trained ones."""


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Read the sidecar; None if the adapter was not written by this library.

    Raises:
        AdapterError: the sidecar is malformed, or a value has the wrong type.
    """
    path = folder / IDENTITY
    if not path.is_file():
        return None
    values = read_json(path)
    for key in STRING_KEYS:
        _check_type(path, key, values.get(key), str)
    for key in OBJECT_KEYS:
        _check_type(path, key, values.get(key, {}), dict)
    for key in (TRANSPOSED, ZERO_UPDATES):
        _check_names(path, key, values.get(key, []))
    for kind_of_storage, digest in values.get("base_digests", {}).items():
        if not isinstance(digest, str):
            raise AdapterError(
                f"{path} has the {kind_of_storage} digest {digest!r}, but it must be a string; "
                "fetch or train the adapter again"
            )
    return values


def _check_names(path: Path, key: str, names: Any) -> None:
    """Refuse a sidecar value that is not a list of names."""
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise AdapterError(
            f"{path} has {key}={names!r}, but it must be a list of strings; "
            "fetch or train the adapter again"
        )


def _check_type(path: Path, key: str, value: Any, kind: type) -> None:
    """Refuse a sidecar value of the wrong type; a string may be null."""
    if isinstance(value, kind) or (kind is str and value is None):
        return
    expected = "a string" if kind is str else "an object"
    raise AdapterError(
        f"{path} has {key}={value!r}, but it must be {expected}; fetch or train the adapter again"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object.

    Raises:
        AdapterError: the file is missing or malformed.
    """
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
            f"{path} contains {type(value).__name__}, but it must contain an object; "
            "fetch or train the adapter again"
        )
    return value
