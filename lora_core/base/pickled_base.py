"""Convert a base whose weights are pickles, pytorch_model*.bin, to safetensors.

    pytorch_model.bin                                  ─→  model.safetensors
    pytorch_model.bin.index.json, pytorch_model-….bin  ─→  model.safetensors.index.json, model-….

One file is in memory at a time. All other files are copied, except weights in other formats.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_core.base.pickled_tensors import read_pickled_tensors
from lora_core.base.sharing import memory_of
from lora_core.base.weight_files import (
    CONFIG,
    HEADS,
    INDEX,
    SINGLE,
    module_name,
    read_object,
)
from lora_core.errors import CheckpointError
from lora_core.files import atomic_folder, overlap, write_json

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".safetensors")
"""Suffixes of weight files that are not copied."""


def convert_pickled_base(base: Path, destination: Path) -> tuple[str, ...]:
    """Write a base with safetensors in place of pickles; return the names of the weight files.

    A tensor that shares the memory of another, such as a tied head, is written once.

    Args:
        base: folder with config.json and pytorch_model.bin, in one file or in shards with an index;
            only read.
        destination: created or replaced; it appears complete or not at all.

    Raises:
        CheckpointError: a file is missing or malformed, a pickle holds more than tensors, the
            index and the files disagree, or the destination overlaps the base.
    """
    if overlap(destination, base):
        raise CheckpointError(
            f"{destination} overlaps {base}, which is only read; choose another destination"
        )
    read_object(base / CONFIG)
    files = _pickle_files(base)
    with atomic_folder(destination) as aside:
        weight_map: dict[str, str] = {}
        total = 0
        for file in files:
            tensors = _read_pickle(base / file)
            name = SINGLE if file == PICKLE else _safetensors_name(file)
            save_file(tensors, str(aside / name), metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if files != [PICKLE]:
            _check_index(base, weight_map)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(aside / INDEX, index)
        _copy_rest(base, aside)
    return tuple(sorted(set(weight_map.values())))


def _pickle_files(base: Path) -> list[str]:
    if (base / PICKLE).is_file():
        return [PICKLE]
    if not (base / PICKLE_INDEX).is_file():
        raise CheckpointError(
            f"{base} has neither {PICKLE} nor {PICKLE_INDEX}; give the folder of a saved model"
        )
    names = _indexed(base)
    files = sorted(set(names.values()))
    for file in files:
        if Path(file).name != file or not file.endswith(".bin"):
            raise CheckpointError(
                f"{base / PICKLE_INDEX} names the file {file!r}, which must be a .bin file in the "
                "same folder; fetch the base again"
            )
    return files


def _indexed(base: Path) -> dict[str, str]:
    names = read_object(base / PICKLE_INDEX).get("weight_map")
    are_texts = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if not names or not are_texts:
        raise CheckpointError(
            f"{base / PICKLE_INDEX} has no weight_map of tensor names to file names; fetch the "
            "base again"
        )
    found: dict[str, str] = names
    return found


def _safetensors_name(file: str) -> str:
    stem = file.removesuffix(".bin")
    return f"{stem.replace('pytorch_model', 'model', 1)}.safetensors"


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, each contiguous.

    Of those that share memory, one is returned: the embedding rather than a tied head.
    """
    tensors = read_pickled_tensors(path, CheckpointError, advice="fetch the base again")
    seen: set[Any] = set()
    found: dict[str, Tensor] = {}
    for name in sorted(tensors, key=lambda name: module_name(name) in HEADS):
        memory = memory_of(tensors[name])
        if memory not in seen:
            seen.add(memory)
            found[name] = tensors[name].detach().clone(memory_format=torch.contiguous_format)
    return found


def _check_index(base: Path, weight_map: dict[str, str]) -> None:
    """Raise if a file lacks a tensor that the index names, or holds another one."""
    indexed = _indexed(base)
    unknown = sorted(weight_map.keys() - indexed.keys())
    if unknown:
        raise CheckpointError(
            f"{base / PICKLE_INDEX} does not name {unknown[0]}, which a file holds; fetch the base "
            "again"
        )


def _copy_rest(base: Path, destination: Path) -> None:
    for path in sorted(base.iterdir()):
        is_weight = path.suffix in OTHER_WEIGHTS or path.name in (PICKLE_INDEX, INDEX)
        if path.is_file() and not is_weight:
            shutil.copyfile(path, destination / path.name)
