"""Convert an adapter whose weights are a pickle, adapter_model.bin, to safetensors.

A pickle can run code when it is read. PyTorch's weights-only reader accepts tensors and plain
containers and refuses everything else.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_core.adapter.adapter_files import CONFIG, WEIGHTS, check_values, read_json
from lora_core.adapter.peft_keys import plain_keys
from lora_core.errors import AdapterError
from lora_core.files import atomic_folder, overlap, sha256_of_file

PICKLE = "adapter_model.bin"


def convert_pickled_adapter(adapter: Path, destination: Path) -> str:
    """Write an adapter of an old PEFT with safetensors; return the SHA-256 of its weights.

    Args:
        adapter: folder with adapter_model.bin and adapter_config.json; only read.
        destination: created or replaced.

    Raises:
        AdapterError: a file is missing or malformed, the pickle holds more than tensors, a tensor
            is not finite, or the destination overlaps the adapter.
    """
    if overlap(destination, adapter):
        raise AdapterError(
            f"{destination} overlaps {adapter}, which is only read; choose another destination"
        )
    read_json(adapter / CONFIG)
    tensors = plain_keys(_read_pickle(adapter / PICKLE), str(adapter / PICKLE))
    check_values(tensors, str(adapter / PICKLE))
    copies = {key: tensor.clone().contiguous() for key, tensor in sorted(tensors.items())}
    with atomic_folder(destination) as aside:
        save_file(copies, str(aside / WEIGHTS), metadata={"format": "pt"})
        (aside / CONFIG).write_bytes((adapter / CONFIG).read_bytes())
        return sha256_of_file(aside / WEIGHTS)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing; give the folder of a saved adapter") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise AdapterError(
            f"{path} is damaged, or holds more than tensors ({first_line}); "
            "save the adapter again as safetensors"
        ) from error
    if not _is_named_tensors(found):
        raise AdapterError(
            f"{path} holds {type(found).__name__}, but it must map names to tensors; "
            "save the adapter again"
        )
    tensors: dict[str, Tensor] = found
    return tensors


def _is_named_tensors(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    are_names = all(isinstance(key, str) for key in value)
    return are_names and all(isinstance(tensor, Tensor) for tensor in value.values())
