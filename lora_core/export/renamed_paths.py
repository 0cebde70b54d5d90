"""The contents of an adapter for a model whose modules have other paths now.

A library can rename the modules of a model, such as `model.layers` to
`model.language_model.layers`. The beginning of every path that the adapter names is replaced: in
the keys of its tensors, in its settings and in its sidecar.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lora_core.adapter.adapter_files import pattern_for
from lora_core.adapter.contents import AdapterContents
from lora_core.adapter.json_files import PREFIX, TRANSPOSED, ZERO_UPDATES
from lora_core.errors import AdapterError

PATH_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
"""Settings that can list complete paths."""


def with_renamed_paths(contents: AdapterContents, renames: Mapping[str, str]) -> AdapterContents:
    """Return the contents with the beginnings of module paths replaced.

    Args:
        contents: not changed.
        renames: beginning of a path, up to a dot or its end → what replaces it.

    Raises:
        AdapterError: no module path begins with an entry of `renames`, or two tensors would get
            one key.
    """
    tensors: dict[str, Tensor] = {}
    used: set[str] = set()
    for key, tensor in contents.tensors.items():
        path = key.removeprefix(PREFIX)
        used.update(old for old in renames if _begins_with(path, old))
        tensors[f"{PREFIX}{_renamed(path, renames)}"] = tensor
    unused = sorted(renames.keys() - used)
    if unused:
        example = next(iter(contents.factors), "none")
        raise AdapterError(
            f"no module of {contents.folder} has a path that begins with {unused[0]!r}; its paths "
            f"are such as {example}"
        )
    if len(tensors) != len(contents.tensors):
        raise AdapterError(
            f"the new names {dict(renames)} give two tensors of {contents.folder} one key; "
            "choose names that the adapter does not have"
        )
    changed = replace(contents, tensors=tensors, identity=_identity(contents, renames))
    return replace(changed, values=_values(contents, changed, renames))


def _begins_with(path: str, beginning: str) -> bool:
    return path == beginning or path.startswith(f"{beginning}.")


def _renamed(path: str, renames: Mapping[str, str]) -> str:
    """Replace the longest entry that the path begins with."""
    matches = [old for old in renames if _begins_with(path, old)]
    if not matches:
        return path
    old = max(matches, key=len)
    return f"{renames[old]}{path.removeprefix(old)}".removeprefix(".")


def _values(
    contents: AdapterContents, changed: AdapterContents, renames: Mapping[str, str]
) -> dict[str, Any]:
    """Return the settings for the renamed modules."""
    values = dict(contents.values)
    for setting in PATH_LISTS:
        names = values.get(setting)
        if isinstance(names, list):
            values[setting] = [_renamed(name, renames) for name in names]
    targets = values.get("target_modules")
    modules = list(changed.layers)
    if isinstance(targets, str) and not all(re.fullmatch(targets, name) for name in modules):
        values["target_modules"] = modules
    tokens = values.get("trainable_token_indices")
    if isinstance(tokens, dict):
        named = {_renamed(name, renames): rows for name, rows in tokens.items()}
        values["trainable_token_indices"] = named
    return {**values, **_patterns(contents, renames)}


def _patterns(contents: AdapterContents, renames: Mapping[str, str]) -> dict[str, Any]:
    """Return patterns that give each renamed module the rank and alpha that it had."""
    settings = contents.scales
    if not (settings.rank_pattern or settings.alpha_pattern):
        return {}
    new_names = {name: _renamed(name, renames) for name in contents.layers}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, new_name in new_names.items():
        pattern = pattern_for(new_name, list(new_names.values()))
        if settings.rank_of(name) != settings.r:
            ranks[pattern] = settings.rank_of(name)
        if settings.alpha_of(name) != settings.lora_alpha:
            alphas[pattern] = settings.alpha_of(name)
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def _identity(contents: AdapterContents, renames: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the sidecar with renamed modules."""
    if contents.identity is None:
        return None
    identity = dict(contents.identity)
    if TRANSPOSED in identity:
        identity[TRANSPOSED] = [_renamed(name, renames) for name in identity[TRANSPOSED]]
    if ZERO_UPDATES in identity:
        paths = [key.removeprefix(PREFIX) for key in identity[ZERO_UPDATES]]
        identity[ZERO_UPDATES] = [f"{PREFIX}{_renamed(path, renames)}" for path in paths]
    return identity
