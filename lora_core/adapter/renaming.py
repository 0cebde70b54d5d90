"""Adapters of models whose modules have other names in another version of the model's library.

A file names modules by the paths that they had when it was written. The caller knows how paths
changed; what is read here is the file's tensors under the paths of the model at hand. A path that
the model has is never renamed, so the same functions serve files from before and after a change.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from lora_core.adapter.json_files import PREFIX
from lora_core.errors import AdapterError
from lora_core.modules import plain_modules

Rename = Callable[[str], str]
"""Maps the name of a weight, such as `encoder.layer.0.weight`, to its name in another version.

A name that did not change is mapped to itself.
"""
OF_ADAPTER = re.compile(r"\.(lora_|base_layer\.|token_adapter\.).*|\.[^.]+$")
"""What follows a module's path in a key."""
WEIGHT = ".weight"


@dataclass(frozen=True, eq=False)
class RenamedTensors:
    """The tensors of a file under the module paths of a model."""

    tensors: dict[str, Tensor]
    keys: dict[str, str] = field(default_factory=dict)
    """Key in the file → key now."""
    former: dict[str, str] = field(default_factory=dict)
    """Module path → its path in the file, or the one it would have there, if these differ."""

    def in_file(self, path: str) -> str:
        """Return the name of a module that the settings of the file refer to."""
        return self.former.get(path, path)


def rename_modules(
    tensors: Mapping[str, Tensor], renames: Sequence[Rename], model: nn.Module, folder: Path
) -> RenamedTensors:
    """Return the tensors of a file under the module paths of `model`.

    Args:
        tensors: under PEFT's keys.
        renames: tried in order for each path that `model` does not have; usually one from former
            names to present ones and one back.
        model: with or without an adapter; not changed.
        folder: for messages.

    Raises:
        AdapterError: two tensors get the same key.
    """
    modules = plain_modules(model)
    keys: dict[str, str] = {}
    former: dict[str, str] = {}
    for key in tensors:
        found = _path_in(key)
        path = _present_path(found, renames, modules)
        keys[key] = key
        if path != found:
            keys[key] = key.replace(f"{PREFIX}{found}", f"{PREFIX}{path}", 1)
            former[path] = found
    renamed = {keys[key]: tensor for key, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise AdapterError(
            f"{folder} has tensors of one module under two of its names, such as "
            f"{_first_twice(keys)}; save the adapter again"
        )
    if former:
        former = {**_other_names(modules, renames), **former}
    return RenamedTensors(renamed, keys, former)


def _path_in(key: str) -> str:
    return OF_ADAPTER.sub("", key.removeprefix(PREFIX), count=1)


def _present_path(path: str, renames: Sequence[Rename], modules: Mapping[str, nn.Module]) -> str:
    """Return the path in the model; `path` itself if it is there or no renaming leads to one."""
    if path in modules:
        return path
    for rename in renames:
        renamed = _renamed(path, rename)
        if renamed in modules:
            return renamed
    return path


def _other_names(modules: Mapping[str, nn.Module], renames: Sequence[Rename]) -> dict[str, str]:
    """Return the first other name of each module that has one."""
    names: dict[str, str] = {}
    for path in modules:
        for rename in renames:
            other = _renamed(path, rename)
            if other != path and other not in modules:
                names.setdefault(path, other)
    return names


def _renamed(path: str, rename: Rename) -> str:
    return rename(f"{path}{WEIGHT}").removesuffix(WEIGHT)


def _first_twice(keys: Mapping[str, str]) -> str:
    """Return the first key whose new name another one has too."""
    names = list(keys.values())
    return next(key for key, name in keys.items() if names.count(name) > 1)
