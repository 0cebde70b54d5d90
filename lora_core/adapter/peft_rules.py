"""PEFT's rules for its own files: which modules its settings name.

PEFT matches `modules_to_save` with any ending of a path, skips names that match nothing, and saves
complete embeddings when their size changed. Such files are read by the same rules; what is read is
still compared strictly with the model.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_core.adapter.checks import path_ends_with
from lora_core.adapter.json_files import CONFIG, PREFIX, read_json
from lora_core.adapter.peft_compat import vocabulary_modules
from lora_core.adapter.renaming import RenamedTensors
from lora_core.base.sharing import is_head_tied
from lora_core.config import ALL_LINEAR, LoraConfig, matches_end
from lora_core.errors import AdapterError
from lora_core.layers.parameters import parameter_targets
from lora_core.modules import plain_modules
from lora_core.planning import adaptable_names

FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(?:A\.weight|embedding_A)")
"""Key of the first factor of an update: module path."""
FIRST_BLOCK = r".*?\.[^.]*\.(\d+)\."
"""Matches the beginning of a path up to the first number in it, the index of the block."""


def by_peft_rules(
    config: LoraConfig, file: RenamedTensors, model: nn.Module, folder: Path
) -> LoraConfig:
    """Return the config of PEFT's file with every setting resolved to full module paths.

    Args:
        config: as the file states it.
        file: the tensors of the file, under the model's paths.
        model: the base, not changed.
        folder: the adapter's folder.

    Raises:
        AdapterError: a name of modules_to_save matches nothing, or the file ties the embedding and
            the output head.
    """
    values = read_json(folder / CONFIG)
    saved = _saved_modules(config, file, model, folder)
    names = _target_names(config, values, file, model)
    bias = config.bias if _is_any_biased(config, names, model) else "none"
    if values.get("ensure_weight_tying") and is_head_tied(model):
        _refuse_tied_updates([*names, *saved], model, folder)
    return replace(
        config,
        target_modules=tuple(names),
        exclude_modules=(),
        layers_to_transform=(),
        modules_to_save=tuple(saved),
        bias=bias,
        rank_pattern=_effective(config.rank_pattern, names, config, file),
        alpha_pattern=_effective(config.alpha_pattern, names, config, file),
    )


def _saved_modules(
    config: LoraConfig, file: RenamedTensors, model: nn.Module, folder: Path
) -> list[str]:
    """Return the paths of fully saved modules: named ones, and embeddings that were resized."""
    plain = plain_modules(model)
    found: list[str] = []
    for name in config.modules_to_save:
        matches = [path for path in plain if file.in_file(path).endswith(name)]
        if not matches:
            raise AdapterError(
                f"{folder / CONFIG} has modules_to_save={name!r}, which matches no module; "
                "load it on the base it was trained on"
            )
        found += (path for path in matches if path not in found)
    for path in vocabulary_modules(model):
        is_found = any(f"{path}.".startswith(f"{one}.") for one in found)
        if f"{PREFIX}{path}.weight" in file.tensors and not is_found:
            found.append(path)
    return found


def _target_names(
    config: LoraConfig, values: Mapping[str, Any], file: RenamedTensors, model: nn.Module
) -> list[str]:
    """Return the adaptable modules that the file's settings select.

    Without target_modules, PEFT uses defaults of its version, so the tensors decide, or it adapts
    target_parameters alone.
    """
    candidates = adaptable_names(model)
    parameters = parameter_targets(plain_modules(model), config.target_parameters)
    if parameters and not config.target_modules:
        return []
    in_file: set[str] = set()
    for key in file.tensors:
        match = FACTOR.fullmatch(key)
        if match is not None:
            in_file.add(match[1])
    if not config.target_modules or config.target_modules == ALL_LINEAR:
        return [name for name in candidates if name in in_file and name not in parameters]
    names = [name for name in candidates if _is_target(file.in_file(name), config, values)]
    left = [name for name in names if not _is_excluded(file.in_file(name), config)]
    if config.exclude_modules and len(left) == len(names):
        raise AdapterError(
            f"exclude_modules={config.exclude_modules!r} excludes none of the targets, so the "
            "config is of another adapter; fetch or train the adapter again"
        )
    return left


def _is_any_biased(config: LoraConfig, targets: list[str], model: nn.Module) -> bool:
    """Return whether there is a bias to train; PEFT accepts the setting without one."""
    modules = plain_modules(model)
    names = targets if config.bias == "lora_only" else list(modules)
    return any(_is_biased(modules[name]) for name in names)


def _is_biased(module: nn.Module) -> bool:
    """Return whether a module has a bias; nn.MultiheadAttention has several of other names."""
    has_bias = module._parameters.get("bias") is not None
    return has_bias or isinstance(module, nn.MultiheadAttention)


def _is_target(name: str, config: LoraConfig, values: Mapping[str, Any]) -> bool:
    """Return whether PEFT adapts the module; a path in full overrules layers_to_transform."""
    targets = config.target_modules
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    if not path_ends_with(name, targets):
        return False
    if not config.layers_to_transform:
        return True
    return _block(name, values.get("layers_pattern")) in config.layers_to_transform


def _block(name: str, pattern: Any) -> int | None:
    """Return the index of the module's block; `pattern` is what precedes it, or several."""
    patterns = [pattern] if isinstance(pattern, str) and pattern else list(pattern or ())
    rules = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in patterns] or [FIRST_BLOCK]
    for rule in rules:
        match = re.match(rule, name)
        if match is not None:
            return int(match[1])
    return None


def _is_excluded(name: str, config: LoraConfig) -> bool:
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if re.fullmatch(excluded, name):
            return True
    elif path_ends_with(name, excluded):
        return True
    saved = config.modules_to_save
    return any(re.match(rf"(^|.*\.){one}($|\..*)", name) for one in saved)


def _refuse_tied_updates(names: Collection[str], model: nn.Module, folder: Path) -> None:
    tied = [path for path in vocabulary_modules(model) if path in names]
    if tied:
        raise AdapterError(
            f"{folder / CONFIG} sets ensure_weight_tying=True and trains {tied[0]}, so one update "
            "applies to the embedding and the head; merge the adapter with PEFT, or train it "
            "without ensure_weight_tying"
        )


def _effective(
    patterns: Mapping[str, Any], names: list[str], config: LoraConfig, file: RenamedTensors
) -> dict[str, Any]:
    """Return the entries that apply to a target; PEFT skips the others.

    If modules were renamed, each target gets its own entry. Parameters such as stacks of experts
    have names that only planning knows, so all entries are kept with them.
    """
    if config.target_parameters:
        return dict(patterns)
    used: dict[str, Any] = {}
    for name in names:
        matching = [key for key in patterns if matches_end(key, file.in_file(name))]
        if matching:
            entry = f"^{re.escape(name)}" if file.former else matching[0]
            used[entry] = patterns[matching[0]]
    if file.former:
        return used
    return {key: value for key, value in patterns.items() if key in used}
