"""A Hugging Face checkpoint folder, read and written one tensor at a time.

    config.json                     what the model is
    model.safetensors               every weight, or else
    model.safetensors.index.json    tensor name → file, and the files it names

Tensors are mapped from their files and read where they are touched, so a model of any size can be looked at. A
safetensors file is the length of a header in 8 bytes, the header (JSON: dtype, shape and place of each tensor), and
the tensors' bytes without a gap; it is written in that order, so that one tensor at a time is held.
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

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
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
"""What language models call their output head; tied, it has no weight of its own."""
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
    """What a checkpoint folder holds; no weight has been read yet."""

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    """Tensor name → where and what it is."""
    index: dict[str, Any] | None
    """The content of the index; None for a single file."""

    @property
    def files(self) -> list[str]:
        """The weight files, in the order of their names."""
        return sorted({entry.file for entry in self.entries.values()})

    @property
    def head_is_tied(self) -> bool | None:
        """Whether config.json says that the output head is the embedding; None where it leaves that to the model's class."""
        text = self.config.get("text_config")
        inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        return self.config.get("tie_word_embeddings", inner)

    def is_tied_copy(self, name: str) -> bool:
        """Tell whether the tensor `name` is the embedding a second time: the weight of a tied head."""
        return bool(self.head_is_tied) and module_name(name) in HEADS

    @property
    def stored_head(self) -> str | None:
        """The output head's weight, where the files hold one."""
        return next(
            (
                name
                for name in self.entries
                if name.endswith(".weight") and module_name(name) in HEADS
            ),
            None,
        )


def module_name(tensor: str) -> str:
    """Return the last part of the path of the module whose weight `tensor` is."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's config, index and headers.

    Raises:
        CheckpointError: a file is missing or damaged, the index and the files disagree, or there are only pickles.
    """
    config = read_object(folder / CONFIG)
    if (folder / SINGLE).is_file():
        return Checkpoint(folder, config, dict(_entries(folder / SINGLE)), None)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f"{pickles[0]} is a pickle, which can run code: convert it to safetensors"
            if pickles
            else "give the folder of a saved model"
        )
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; {hint}")
    index = read_object(folder / INDEX)
    places = _weight_map(folder, index)
    entries = {
        name: entry
        for file in sorted(set(places.values()))
        for name, entry in _entries(folder / file)
    }
    wrong = sorted(
        name
        for name in places.keys() | entries.keys()
        if name not in entries or entries[name].file != places.get(name)
    )
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX} and the files disagree about {len(wrong)} tensors, such as {wrong[0]}; fetch the base again"
        )
    return Checkpoint(folder, config, entries, index)


class Tensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, mapped from their files: only what is touched is read."""

    def __init__(self, handles: dict[str, Any], entries: Mapping[str, Entry]) -> None:
        self._handles, self._entries = handles, entries

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
        files = {entry.file for entry in entries.values()}
        yield Tensors(
            {file: stack.enter_context(_opened(folder / file)) for file in sorted(files)}, entries
        )


def write_tensors(path: Path, entries: Mapping[str, Entry], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file in the order of `entries`, taking one tensor after the other.

    Args:
        path: created or replaced, not flushed.
        entries: name, shape and dtype of each; widest dtype first keeps every tensor aligned.
        tensors: as many, in the same order, drawn one at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.bytes],
        }
        place += entry.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, entry), tensor in zip(entries.items(), tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), name
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _entries(path: Path) -> Iterator[tuple[str, Entry]]:
    with _opened(path) as handle:
        for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
            described = handle.get_slice(name)
            if described.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{name} of {path} is stored as {described.get_dtype()}, which is no plain dtype; use a dense base"
                )
            yield (
                name,
                Entry(path.name, tuple(described.get_shape()), DTYPES[described.get_dtype()]),
            )


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
    places = index.get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(file, str) and Path(file).name == file for file in places.values())
    ):
        raise CheckpointError(
            f"{folder / INDEX} has no weight_map of tensor names to file names; fetch the base again"
        )
    return places


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of the base that holds an object; raises CheckpointError where it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; give the folder of a saved model") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch the base again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds {type(value).__name__} where an object belongs; fetch the base again"
        )
    return value
