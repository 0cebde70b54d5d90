"""What an adapter's folder holds, read without a model and without refusing what is unusual.

Loading is strict (see `io.py`); this reader is for looking at an adapter that may not be loadable.
Only a file that cannot be read at all is an error.

    factors    module path → A and B of its update, also if one of them is missing
    others     key → every other tensor: magnitudes, biases, fully trained modules, unknown ones
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_core.adapter.checks import path_ends_with
from lora_core.adapter.json_files import CONFIG, PREFIX, WEIGHTS, read_identity, read_json
from lora_core.adapter.key_layouts import MAGNITUDE, plain_layout
from lora_core.adapter.pickles import PICKLE, convert_pickled_adapter
from lora_core.config import LoraConfig
from lora_core.errors import AdapterError, ConfigError

FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(?:(embedding)_)?([AB])(?:\.weight)?")
"""Key of one factor: module path, whether it is an embedding's, and letter."""
SCALE_FIELDS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Fields of adapter_config.json that decide ranks and scales."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of one module's update as the file holds them."""

    a: Tensor | None = None
    """(r, in); of a convolution (r, in, height, width)."""
    b: Tensor | None = None
    """(out, r); of a convolution (out, r / groups, 1, 1)."""
    is_embedding: bool = False

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and B (out, r) as matrices; None unless both hold values and fit each other.

        B of a convolution with groups is filled with zeros outside the groups.
        """
        if self.a is None or self.b is None or self.a.dim() < 2 or self.b.dim() < 2:
            return None
        a = self.a.flatten(1)
        b = self.b.flatten(1)
        groups, rest = divmod(a.shape[0], max(b.shape[1], 1))
        if self.a.dim() > 2 and groups > 1 and not rest:
            b = torch.block_diag(*b.chunk(groups))
        fit = a.shape[0] == b.shape[1] and a.numel() > 0 and b.numel() > 0
        return (a, b) if fit else None

    @property
    def tensors(self) -> list[Tensor]:
        """The factors that are there."""
        return [factor for factor in (self.a, self.b) if factor is not None]


@dataclass(frozen=True, eq=False)
class AdapterContents:
    """The files of one adapter."""

    folder: Path
    file: Path
    """The file with the weights."""
    values: dict[str, Any]
    """The content of adapter_config.json."""
    identity: dict[str, Any] | None
    """The content of the sidecar; None without one."""
    tensors: dict[str, Tensor]
    """All tensors under PEFT's keys."""
    changes: tuple[str, ...]
    """How the keys in the file differ from those, in words."""

    @cached_property
    def factors(self) -> dict[str, Factors]:
        """Module path → the factors of its update, in the order of the paths."""
        found: dict[str, dict[str, Any]] = {}
        for key, tensor in self.tensors.items():
            match = FACTOR.fullmatch(key)
            if match is not None:
                fields = found.setdefault(match[1], {})
                fields[match[3].lower()] = tensor
                fields["is_embedding"] = match[2] is not None
        return {name: Factors(**found[name]) for name in sorted(found)}

    @cached_property
    def layers(self) -> dict[str, Factors]:
        """The factors of layers, without those of bare parameters, such as stacks of experts.

        The factors of a stack hold one pair per expert side by side.
        """
        owners = [name.rpartition(".")[0] for name in self.values.get("target_parameters") or ()]
        return {
            name: factors
            for name, factors in self.factors.items()
            if not path_ends_with(name.removesuffix(".base_layer"), owners)
        }

    @cached_property
    def others(self) -> dict[str, Tensor]:
        """Key → each tensor that is not a factor."""
        return {key: value for key, value in self.tensors.items() if not FACTOR.fullmatch(key)}

    @cached_property
    def magnitudes(self) -> dict[str, Tensor]:
        """Module path → DoRA's magnitude of each row."""
        found: dict[str, Tensor] = {}
        for key, tensor in self.others.items():
            if key.endswith(MAGNITUDE):
                found[key.removeprefix(PREFIX).removesuffix(MAGNITUDE)] = tensor
        return found

    @cached_property
    def scales(self) -> LoraConfig:
        """The settings that decide ranks and scales; the targets in it mean nothing."""
        return scale_settings(self.values, self.folder)


def read_contents(folder: Path) -> AdapterContents:
    """Read an adapter of any age in PEFT's format, from safetensors or from adapter_model.bin.

    Raises:
        AdapterError: a file is missing or unreadable, it is not a LoRA, or holds several adapters.
    """
    values = read_json(folder / CONFIG)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{folder / CONFIG} has peft_type {kind!r}, but only LORA adapters are read; "
            "give the folder of a LoRA"
        )
    if not (folder / WEIGHTS).is_file() and (folder / PICKLE).is_file():
        return _read_pickled(folder, values)
    layout = plain_layout(_read_safetensors(folder), str(folder / WEIGHTS))
    return AdapterContents(
        folder=folder,
        file=folder / WEIGHTS,
        values=values,
        identity=read_identity(folder),
        tensors=layout.tensors,
        changes=layout.changes,
    )


def scale_settings(values: Mapping[str, Any], folder: Path) -> LoraConfig:
    """Return the fields of adapter_config.json that decide ranks and scales as a LoraConfig.

    Raises:
        AdapterError: a value breaks its rule, or r or lora_alpha is missing.
    """
    fields = {name: values[name] for name in SCALE_FIELDS if values.get(name) is not None}
    try:
        return LoraConfig(**fields)
    except (ConfigError, TypeError) as error:
        raise AdapterError(
            f"{folder / CONFIG} is not a valid LoRA configuration: {error}; save the adapter again"
        ) from error


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(
            f"{folder} has neither {WEIGHTS} nor {PICKLE}; give the folder of a saved adapter"
        )
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path} is damaged ({error}); fetch or train the adapter again"
        ) from error


def _read_pickled(folder: Path, values: dict[str, Any]) -> AdapterContents:
    """Read the tensors of a pickle, which only PyTorch's weights-only reader opens."""
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "adapter"
        convert_pickled_adapter(folder, converted)
        layout = plain_layout(_read_safetensors(converted), str(folder / PICKLE))
        tensors = {key: tensor.clone() for key, tensor in layout.tensors.items()}
    return AdapterContents(
        folder=folder,
        file=folder / PICKLE,
        values=values,
        identity=None,
        tensors=tensors,
        changes=(f"read from the pickle {PICKLE}", *layout.changes),
    )
