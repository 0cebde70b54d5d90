"""A Hugging Face checkpoint folder, read and written one tensor at a time.

    config.json                     describes the model
    model.safetensors               every weight, or instead:
    model.safetensors.index.json    tensor name → file, and the files it names

Tensors are memory-mapped and read on access, so a model of any size can be inspected. A safetensors
file is the length of its header in 8 bytes, the header (JSON: dtype, shape and offsets of each
tensor), and the tensors' bytes without gaps; it is written in that order, so only one tensor at a
time is in memory.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_core.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADS = ("lm_head", "embed_out")
"""Names of language models' output heads; a tied head has no stored weight."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor as the header of its file describes it."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder; no weight has been read yet."""

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    """Tensor name → its file, shape and dtype."""
    index: dict[str, Any] | None
    """The content of the index; None for a single file."""

    @property
    def files(self) -> list[str]:
        """The weight files, in the order of their names."""
        return sorted({entry.file for entry in self.entries.values()})

    @property
    def head_is_tied(self) -> bool | None:
        """The flag for a tied output head in config.json; None leaves it to the model's class."""
        text = self.config.get("text_config")
        inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        return self.config.get("tie_word_embeddings", inner)

    def is_tied_copy(self, name: str) -> bool:
        """Return whether tensor `name` duplicates the embedding: the weight of a tied head."""
        return bool(self.head_is_tied) and module_name(name) in HEADS

    @property
    def stored_head(self) -> str | None:
        """The name of the output head's weight; None if the files have none."""
        for name in self.entries:
            if name.endswith(".weight") and module_name(name) in HEADS:
                return name
        return None


def module_name(tensor: str) -> str:
    """Return the last part of the path of the module that owns the weight `tensor`."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's config, index and headers.

    Raises:
        CheckpointError: a file is missing or damaged, the index and the files disagree, or the
            folder has only pickles.
    """
    config = read_object(folder / CONFIG)
    if (folder / SINGLE).is_file():
        return Checkpoint(folder, config, dict(_entries(folder / SINGLE)), None)
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}; {_missing_weights_hint(folder)}"
        )
    index = read_object(folder / INDEX)
    files = _weight_map(folder, index)
    entries: dict[str, Entry] = {}
    for file in sorted(set(files.values())):
        entries.update(_entries(folder / file))
    wrong: list[str] = []
    for name in files.keys() | entries.keys():
        if name not in entries or entries[name].file != files.get(name):
            wrong.append(name)
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX} and the files disagree about {len(wrong)} tensors, such as "
            f"{min(wrong)}; fetch the base again"
        )
    return Checkpoint(folder, config, entries, index)


def _missing_weights_hint(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code: convert the folder with "
            "lora_core.convert_pickled_base"
        )
    return "give the folder of a saved model"


class Tensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, memory-mapped: only tensors that are accessed are read."""

    def __init__(self, handles: dict[str, Any], entries: Mapping[str, Entry]) -> None:
        self._handles = handles
        self._entries = entries

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._handles[self._entries[name].file].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@contextmanager
def mapped_tensors(folder: Path, entries: Mapping[str, Entry]) -> Iterator[Tensors]:
    """Map the files of `entries` into memory while the block runs."""
    with ExitStack() as stack:
        handles: dict[str, Any] = {}
        for file in sorted({entry.file for entry in entries.values()}):
            handles[file] = stack.enter_context(_opened(folder / file))
        yield Tensors(handles, entries)


def write_tensors(path: Path, entries: Mapping[str, Entry], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file in the order of `entries`, one tensor at a time.

    Args:
        path: created or replaced, not flushed.
        entries: name, shape and dtype of each; widest dtype first keeps every tensor aligned.
        tensors: the same number, in the same order; consumed one at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, entry), tensor in zip(entries.items(), tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), name
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _entries(path: Path) -> Iterator[tuple[str, Entry]]:
    with _opened(path) as handle:
        for name in handle.keys():  # noqa: SIM118 - a handle is not a mapping
            header = handle.get_slice(name)
            dtype = header.get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{name} of {path} is stored as {dtype}, which is not a plain dtype; use a "
                    "dense base"
                )
            yield name, Entry(path.name, tuple(header.get_shape()), DTYPES[dtype])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        handle = safe_open(str(path), framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; fetch the base again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch the base again") from error
    with handle:
        yield handle


def _weight_map(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    """Return tensor name → file name; a name that leaves the folder is refused."""
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not all(map(_is_file_name, files.values())):
        raise CheckpointError(
            f"{folder / INDEX} has no weight_map of tensor names to file names; fetch the base "
            "again"
        )
    return files


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of the base that contains an object.

    Raises:
        CheckpointError: the file is missing, damaged or contains something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; give the folder of a saved model") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch the base again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} contains {type(value).__name__}, but it must contain an object; "
            "fetch the base again"
        )
    return value
