"""Write an adapter's files, with the digests of both in its sidecar."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lora_core.adapter.adapter_files import file_digests
from lora_core.adapter.contents import AdapterContents
from lora_core.adapter.json_files import CONFIG, IDENTITY, PREFIX, WEIGHTS
from lora_core.files import atomic_folder, write_json


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    values: Mapping[str, Any],
    identity: Mapping[str, Any] | None,
) -> str:
    """Write tensors that were read, of any layout; see `write_files`."""
    copies = {key: tensors[key].clone().contiguous() for key in sorted(tensors)}
    return write_files(folder, copies, values=values, identity=identity)


def write_files(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    values: Mapping[str, Any],
    identity: Mapping[str, Any] | None,
) -> str:
    """Write an adapter's files; return the SHA-256 of its weights.

    Args:
        folder: created or replaced; it appears complete or not at all.
        tensors: under PEFT's keys, contiguous; no two share memory.
        values: the content of adapter_config.json.
        identity: the content of the sidecar, whose digests are replaced; None writes none.
    """
    with atomic_folder(folder) as aside:
        save_file(tensors, str(aside / WEIGHTS), metadata={"format": "pt"})
        write_json(aside / CONFIG, values)
        digests = file_digests(aside, tensors)
        if identity is not None:
            write_json(aside / IDENTITY, {**identity, **digests})
    return str(digests["adapter_sha256"])


def write_low_rank_part(contents: AdapterContents, folder: Path) -> None:
    """Write the low-rank updates of layers alone, as a plain adapter.

    Magnitudes, biases, complete modules and updates of bare parameters are left out, so the result
    is not a replacement of the adapter: it is what the merging code reads.
    """
    values = {
        "peft_type": "LORA",
        "target_modules": sorted(contents.layers),
        "fan_in_fan_out": bool(contents.values.get("fan_in_fan_out")),
    }
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if contents.values.get(name) is not None:
            values[name] = contents.values[name]
    tensors: dict[str, Tensor] = {}
    for name in contents.layers:
        for key in _factor_keys(name):
            if key in contents.tensors:
                tensors[key] = contents.tensors[key]
    write_adapter(folder, tensors, values=values, identity=contents.identity)


def _factor_keys(module: str) -> list[str]:
    """Return the keys of the factors of a layer or of an embedding."""
    endings = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    return [f"{PREFIX}{module}.{ending}" for ending in endings]
