"""Read tensors from a pickle without running code.

PyTorch's weights-only reader accepts tensors and plain containers and refuses everything else.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import LoraError


def read_pickled_tensors(path: Path, error: type[LoraError], *, advice: str) -> dict[str, Tensor]:
    """Return name → tensor, mapped into memory where the format allows it.

    Args:
        path: a file of `torch.save`.
        error: raised for a file that is missing, damaged, or holds more than named tensors.
        advice: how to get a better file, for the message.
    """
    try:
        is_mappable = zipfile.is_zipfile(path)  # PyTorch's format since 1.6
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mappable)
    except FileNotFoundError as missing:
        raise error(f"{path} is missing; {advice}") from missing
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as damage:
        first_line = str(damage).partition("\n")[0]
        raise error(
            f"{path} is damaged, or holds more than tensors ({first_line}); {advice}"
        ) from damage
    if not _is_named_tensors(found):
        raise error(
            f"{path} holds {type(found).__name__}, but it must map names to tensors; {advice}"
        )
    tensors: dict[str, Tensor] = found
    return tensors


def _is_named_tensors(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    are_names = all(isinstance(key, str) for key in value)
    return are_names and all(isinstance(tensor, Tensor) for tensor in value.values())
