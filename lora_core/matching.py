"""Which paths the settings of a LoraConfig select; every setting must select something."""

import re
from collections.abc import Mapping

from torch import nn

from lora_core.candidates import Candidate, linear_endings
from lora_core.config import ALL_LINEAR, LoraConfig, Names
from lora_core.coverage import describe_kind, has_own_weight
from lora_core.errors import TargetError
from lora_core.modules import (
    modules_outside_language_model,
    output_head,
    plain_modules,
    unwrapped,
)


def selected_names(
    model: nn.Module,
    config: LoraConfig,
    candidates: Mapping[str, Candidate],
) -> list[str]:
    """Return the paths that a config selects without its `exclude_modules`, in model order.

    Args:
        model: adapted or not.
        config: selects targets by name and by block.
        candidates: path → the modules of `model` that LoRA can adapt.

    Raises:
        TargetError: a pattern or a block selects nothing that LoRA can adapt.
    """
    if config.target_modules == ALL_LINEAR:
        names = _all_linear_names(model, candidates, config)
    else:
        names = _names_matching(config.target_modules, model, candidates)
    if config.layers_to_transform:
        names = _names_in_blocks(names, config.layers_to_transform)
    return names


def without_excluded(names: list[str], config: LoraConfig) -> list[str]:
    """Return the paths that `exclude_modules` of a config does not name.

    Args:
        names: selected paths.
        config: names the modules to exclude.

    Raises:
        TargetError: none or all of `names` are excluded.
    """
    left = [name for name in names if not is_named(name, config.exclude_modules)]
    if not left or len(left) == len(names):
        raise TargetError(
            f"exclude_modules={config.exclude_modules!r} leaves {len(left)} of {len(names)} "
            "targets; it must exclude some but not all"
        )
    return left


def is_named(name: str, names: Names) -> bool:
    """Return whether a setting names a module.

    Args:
        name: path of the module.
        names: a regular expression for complete paths, or paths and path suffixes.
    """
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(is_path_or_suffix(one, name) for one in names)


def is_path_or_suffix(pattern: str, path: str) -> bool:
    """Return whether a name is a module's path or the last part of it.

    Args:
        pattern: the name.
        path: of the module.
    """
    return path == pattern or path.endswith(f".{pattern}")


def block_number(name: str) -> int | None:
    """Return the first number in a module's path: the index of its block in any common model.

    Args:
        name: path; None is returned for a module outside the blocks.
    """
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None


def _all_linear_names(
    model: nn.Module,
    candidates: Mapping[str, Candidate],
    config: LoraConfig,
) -> list[str]:
    """Return all linear layers of the language model except its head and fully trained modules.

    They include linear layers that compute their weight, which `matched_names` refuses. Other
    modules of a multimodal model are adapted only if they are named.
    """
    head = output_head(unwrapped(model))
    towers = tuple(f"{name}." for name in modules_outside_language_model(model))
    names = []
    inside: dict[str, Candidate] = {}
    for name, module in plain_modules(model).items():
        if f"{name}.".startswith(towers):
            continue
        candidate = candidates.get(name)
        if candidate is not None:
            inside[name] = candidate
        is_linear = candidate is not None and candidate.layer == "linear"
        is_computed = isinstance(module, nn.Linear) and not has_own_weight(module)
        is_left_out = module is head or is_named(name, config.modules_to_save)
        if (is_linear or is_computed) and not is_left_out:
            names.append(name)
    if not names:
        raise TargetError(
            f"target_modules={ALL_LINEAR!r} matches no linear layer; "
            f"linear layers here end in {linear_endings(inside)}"
        )
    return names


def _names_matching(
    patterns: Names,
    model: nn.Module,
    candidates: Mapping[str, Candidate],
) -> list[str]:
    """Return the modules that any of the patterns matches, in model order."""
    modules = plain_modules(model)
    chosen: set[str] = set()
    rules: list[Names] = [patterns]
    if not isinstance(patterns, str):
        rules = [(one,) for one in patterns]
    for rule in rules:
        matches = _matches(rule, modules, candidates)
        chosen.update(matches)
    return [path for path in modules if path in chosen]


def _matches(
    rule: Names,
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, Candidate],
) -> list[str]:
    """Return the matches of one pattern; raise if LoRA can adapt none of them."""
    matches = [path for path in modules if is_named(path, rule)]
    if not any(path in candidates for path in matches):
        pattern = rule if isinstance(rule, str) else rule[0]
        problem = "matches no module"
        if matches:
            first = matches[0]
            kind = describe_kind(modules[first])
            problem = f"matches {first}, which cannot be adapted ({kind})"
        raise TargetError(
            f"target {pattern!r} {problem}; linear layers here end in {linear_endings(candidates)}"
        )
    return matches


def _names_in_blocks(names: list[str], blocks: tuple[int, ...]) -> list[str]:
    """Keep the targets of the given blocks; each of them must contain a target."""
    present: set[int] = set()
    for name in names:
        number = block_number(name)
        if number is not None:
            present.add(number)
    missing = sorted(set(blocks) - present)
    if missing:
        raise TargetError(
            f"layers_to_transform names block {missing[0]}, but the targets are in blocks "
            f"{sorted(present)}"
        )
    return [name for name in names if block_number(name) in blocks]
