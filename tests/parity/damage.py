"""Kinds of damage to a saved adapter.

With a sidecar, digests detect damage; in a folder without one, as PEFT writes it, only names,
shapes and values do.
"""

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_core.adapter.json_files import CONFIG, IDENTITY, WEIGHTS

Damage = Callable[[Path], None]
Edit = Callable[[dict[str, Tensor]], object]
FLIPS, CUTS = 1000, 100


# Any byte of the three files


def bit_flips(adapter: Path) -> Iterator[Damage]:
    """Flip one bit, cycling through the existing files."""
    return (_flip(number) for number in range(FLIPS))


def truncations(adapter: Path) -> Iterator[Damage]:
    """Truncate a file, cycling through the existing files."""
    return (_cut(number) for number in range(CUTS))


def _flip(number: int) -> Damage:
    def damage(folder: Path) -> None:
        path, rng = _nth_file(folder, number), random.Random(number)
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    return damage


def _cut(number: int) -> Damage:
    def damage(folder: Path) -> None:
        path = _nth_file(folder, number)
        content = path.read_bytes()
        path.write_bytes(content[: random.Random(number).randrange(len(content))])

    return damage


def _nth_file(folder: Path, number: int) -> Path:
    paths = [folder / name for name in (WEIGHTS, CONFIG, IDENTITY)]
    existing = [path for path in paths if path.is_file()]
    return existing[number % len(existing)]


# Complete tensors, keys and settings


def renamed(adapter: Path) -> Iterator[Damage]:
    """Rename each key: misspelled, of another layer or factor, or of another adapter."""
    changes = (
        ("lora_", "lora"),
        (".layers.0.", ".layers.9."),
        (".layers.1.", ".layers."),
        ("_A.", "_B."),
        (".weight", ".second.weight"),
    )
    for key in _keys(adapter):
        for old, new in changes:
            if old in key:
                yield _edited(_rename(key, key.replace(old, new)))


def missing(adapter: Path) -> Iterator[Damage]:
    """Remove each key, and each pair of factors."""
    for key in _keys(adapter):
        yield _edited(_drop(key))
    for module in {key.partition(".lora_")[0] for key in _keys(adapter)}:
        yield _edited(_drop(f"{module}.lora_"))


def extra(adapter: Path) -> Iterator[Damage]:
    """Copy each tensor to a module that is not adapted or does not exist, or to another feature."""
    for key in _keys(adapter):
        for old, new in (
            ("_proj.", "_proj.again."),
            ("q_proj", "k_proj"),
            ("down_proj", "up_proj"),
            (".weight", ".bias"),
        ):
            if old in key:
                yield _edited(_put(key.replace(old, new), key, Tensor.clone))


def duplicated(adapter: Path) -> Iterator[Damage]:
    """Name each key twice in the header: for its own bytes, and for those of each other key."""
    for key in _keys(adapter):
        for other in _keys(adapter):
            yield partial(_name_twice, key=key, other=other)


def swapped(adapter: Path) -> Iterator[Damage]:
    """Swap each pair of tensors of the same shape."""
    shapes = {key: tensor.shape for key, tensor in load_file(adapter / WEIGHTS).items()}
    for key in shapes:
        for other in shapes:
            if key < other and shapes[key] == shapes[other]:
                yield _edited(_swap(key, other))


def misshapen(adapter: Path) -> Iterator[Damage]:
    """Transpose each tensor, flatten it, and remove a row or a column."""
    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda t: t.T,
        lambda t: t.flatten(),
        lambda t: t[1:],
        lambda t: t[:, 1:],
    )
    for key in _keys(adapter):
        for change in changes:
            yield _edited(_put(key, key, change))


def no_floats(adapter: Path) -> Iterator[Damage]:
    """Store each tensor as integers or booleans."""
    return _converted(adapter, (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool))


def rounded(adapter: Path) -> Iterator[Damage]:
    """Store each tensor in fewer bits; only a digest distinguishes that from a valid adapter."""
    return _converted(adapter, (torch.float16, torch.bfloat16, torch.float8_e4m3fn))


def _converted(adapter: Path, dtypes: tuple[torch.dtype, ...]) -> Iterator[Damage]:
    for key in _keys(adapter):
        for dtype in dtypes:
            yield _edited(_put(key, key, partial(Tensor.to, dtype=dtype)))


def zero(adapter: Path) -> Iterator[Damage]:
    """Set each B to zero, as a save of sharded tensors does."""
    for key in _keys(adapter):
        if ".lora_B." in key:
            yield _edited(_put(key, key, torch.zeros_like))


def not_finite(adapter: Path) -> Iterator[Damage]:
    """Put one NaN or infinity into each tensor."""
    for key in _keys(adapter):
        for value in (float("nan"), float("inf"), -float("inf")):
            yield _edited(_put(key, key, partial(_ending_in, value)))


def other_settings(adapter: Path) -> Iterator[Damage]:
    """Change one setting to another valid value."""
    changes: tuple[dict[str, Any], ...] = (
        {"lora_alpha": 9},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"q_proj": 4}, "r": 5},
        {"use_dora": True},
        {"lora_dropout": 0.5},
        {"target_modules": ["q_proj"]},
        {"layers_to_transform": [0]},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"fan_in_fan_out": True},
        {"peft_type": "IA3"},
    )
    for change in changes:
        yield partial(_set, name=CONFIG, change=change)


def other_base(adapter: Path) -> Iterator[Damage]:
    """Record another base in the sidecar."""
    for digest in ("0" * 64, "", None):
        yield partial(_set, name=IDENTITY, change={"base_digests": {"dense": digest}})


def bare(damages: Iterator[Damage]) -> Iterator[Damage]:
    """Remove the sidecar first, so that no digest detects the damage."""
    return (_without_sidecar(damage) for damage in damages)


def _without_sidecar(damage: Damage) -> Damage:
    def both(folder: Path) -> None:
        (folder / IDENTITY).unlink()
        damage(folder)

    return both


def _keys(adapter: Path) -> list[str]:
    return sorted(load_file(adapter / WEIGHTS))


def _edited(edit: Edit) -> Damage:
    """Change the tensors and write them as a well-formed file."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def _rename(key: str, name: str) -> Edit:
    return lambda tensors: tensors.update({name: tensors.pop(key)})


def _drop(start: str) -> Edit:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(start)]


def _swap(key: str, other: str) -> Edit:
    return lambda tensors: tensors.update({key: tensors[other], other: tensors[key]})


def _put(name: str, key: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: tensors.update({name: change(tensors[key]).contiguous()})


def _ending_in(value: float, tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] = value
    return tensor


def _name_twice(folder: Path, key: str, other: str) -> None:
    """Repeat the header's entry of `other` under the name `key`, as JSON permits."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length].decode().rstrip(), content[8 + length :]
    twice = f'{header[:-1]},"{key}":{json.dumps(json.loads(header)[other])}}}'.encode()
    (folder / WEIGHTS).write_bytes(len(twice).to_bytes(8, "little") + twice + data)


def _set(folder: Path, name: str, change: dict[str, Any]) -> None:
    path = folder / name
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **change}), encoding="utf-8")


Kind = Callable[[Path], Iterator[Damage]]
BY_FORM: dict[str, Kind] = {
    "keys renamed": renamed,
    "keys missing": missing,
    "keys extra": extra,
    "keys twice": duplicated,
    "tensors misshapen": misshapen,
    "tensors of integers": no_floats,
    "a B of zero": zero,
    "NaN or infinity": not_finite,
}
"""Kinds that a load must detect even without a sidecar."""
BY_DIGEST: dict[str, Kind] = {
    "bit flips": bit_flips,
    "truncations": truncations,
    "tensors swapped": swapped,
    "tensors rounded": rounded,
    "settings changed": other_settings,
}
"""Kinds that can leave a well-formed adapter, which only the sidecar's digests detect."""
OF_THE_FILES = {**BY_DIGEST, **BY_FORM}
KINDS = {**OF_THE_FILES, "another base": other_base}
