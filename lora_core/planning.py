"""Which modules get an adapter, of what rank and scale: planned from names and shapes, before anything is changed.

A plan is made on the base alone, also on the meta device, where it costs no memory. Every pattern of a config has to
match something: a misspelt one is an error and not a smaller adapter.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from lora_core.base.quant import base_weight
from lora_core.config import ALL_LINEAR, LoraConfig, Names, matches_end
from lora_core.errors import TargetError
from lora_core.layers.experts import expert_targets
from lora_core.modules import (
    adapter_parts,
    module_at,
    modules_outside_language_model,
    output_head,
    plain_modules,
    unwrapped,
)
from lora_core.targets import Layer, Target


@dataclass(frozen=True)
class Candidate:
    """A module that could get an update."""

    in_features: int
    out_features: int
    kind: str
    layer: Layer


def plan_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """List the modules of `model` that `config` adapts, in model order; nothing is changed.

    Raises:
        TargetError: a pattern matches nothing, a match cannot be adapted, or the rank exceeds a layer.
    """
    _refuse_second_injection(model)
    candidates = _candidates(model)
    names = matched_names(model, config) if config.target_modules else []
    targets = [_target(name, candidates[name], config) for name in names] + _stacks(model, config)
    _check_patterns([target.name for target in targets], config)
    for target in targets:
        _check_target(target, config)
    return targets


def matched_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """List the modules that `config` names in a model, whether adapted or not."""
    candidates = _candidates(model)
    names = (
        _every_linear(model, candidates, config)
        if config.target_modules == ALL_LINEAR
        else _chosen(model, candidates, config)
    )
    if config.layers_to_transform:
        names = _in_layers(names, config.layers_to_transform)
    if config.exclude_modules:
        names = _without_excluded(names, config)
    if config.target_modules == ALL_LINEAR:  # gates of width 1, in which no update has a low rank
        names = [
            name
            for name in names
            if min(candidates[name].in_features, candidates[name].out_features) > 1
        ]
    return names


def _without_excluded(names: list[str], config: LoraConfig) -> list[str]:
    """Leave out what a config excludes."""
    left = [name for name in names if not _is_named(name, config.exclude_modules)]
    if not left or len(left) == len(names):
        raise TargetError(
            f"exclude_modules={config.exclude_modules!r} leaves {len(left)} of {len(names)} targets; it must leave out some and not all"
        )
    return left


def named_modules(model: nn.Module, names: Iterable[str], what: str) -> dict[str, nn.Module]:
    """Return the modules that `names` mean, by path; each name is a path or its last part.

    Raises:
        TargetError: a name matches no module; `what` is the setting that held it.
    """
    plain = plain_modules(model)
    found: dict[str, nn.Module] = {}
    for name in names:
        hits = {
            path: module
            for path, module in plain.items()
            if path == name or path.endswith(f".{name}")
        }
        if not hits:
            raise TargetError(
                f"{what} names {name!r}, which matches no module; name one by its path or the last part of it"
            )
        found |= hits
    return found


def block_number(name: str) -> int | None:
    """Return the first number in a module's path: the number of its block in any common model."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None


def _candidates(model: nn.Module) -> dict[str, Candidate]:
    found = ((name, _candidate(module)) for name, module in plain_modules(model).items())
    return {
        name: candidate for name, candidate in found if candidate is not None and name
    }  # the root has no place to be replaced in


def _candidate(module: nn.Module) -> Candidate | None:
    if type(module) is nn.Conv2d:
        places = module.kernel_size[0] * module.kernel_size[1]
        return Candidate(
            module.in_channels // module.groups * places, module.out_channels, "dense", "conv2d"
        )
    if isinstance(module, nn.Embedding):
        return Candidate(module.num_embeddings, module.embedding_dim, "dense", "embedding")
    weight = base_weight(module)
    if weight is None:
        return None
    out_features, in_features = weight.shape
    return Candidate(in_features, out_features, weight.kind, "linear")


def _every_linear(
    model: nn.Module, candidates: Mapping[str, Candidate], config: LoraConfig
) -> list[str]:
    """Return all linear layers of the language model but its head and what is trained whole.

    What a multimodal model holds next to its language model is adapted only by name.
    """
    head, plain = output_head(unwrapped(model)), plain_modules(model)
    towers = tuple(f"{name}." for name in modules_outside_language_model(model))
    candidates = (
        {name: one for name, one in candidates.items() if not f"{name}.".startswith(towers)}
        if towers
        else candidates
    )
    linear = [
        name
        for name, one in candidates.items()
        if one.layer == "linear" and plain[name] is not head
    ]
    names = [name for name in linear if not _is_named(name, config.modules_to_save)]
    if not names:
        raise TargetError(
            f"target_modules={ALL_LINEAR!r} matches no linear layer; linear layers here end in {_endings(candidates)}"
        )
    return names


def _chosen(model: nn.Module, candidates: Mapping[str, Candidate], config: LoraConfig) -> list[str]:
    patterns = config.target_modules
    rules: tuple[Names, ...] = (
        (patterns,) if isinstance(patterns, str) else tuple((name,) for name in patterns)
    )
    chosen: set[str] = set()
    for rule in rules:
        every = [name for name in plain_modules(model) if _is_named(name, rule)]
        chosen.update(
            _only_adaptable(rule if isinstance(rule, str) else rule[0], every, candidates)
        )
    return [name for name in candidates if name in chosen]


def _is_named(name: str, names: Names) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in names)


def _only_adaptable(
    pattern: str, names: list[str], candidates: Mapping[str, Candidate]
) -> list[str]:
    """Return the layers among `names` that can be adapted; a pattern that finds none is an error of its own."""
    adaptable = [name for name in names if name in candidates]
    if not adaptable:
        what = f"matches {names[0]}, which can get no update" if names else "matches no module"
        raise TargetError(
            f"target {pattern!r} {what}; linear layers here end in {_endings(candidates)}"
        )
    return adaptable


def _in_layers(names: list[str], layers: tuple[int, ...]) -> list[str]:
    """Keep the targets of some blocks; each number must be that of a block."""
    present = {number for name in names if (number := block_number(name)) is not None}
    missing = sorted(set(layers) - present)
    if missing:
        raise TargetError(
            f"layers_to_transform names block {missing[0]}, and the targets lie in blocks {sorted(present)}"
        )
    return [name for name in names if block_number(name) in layers]


def _endings(candidates: Mapping[str, Candidate]) -> str:
    linear = {
        name.rpartition(".")[2]
        for name, candidate in candidates.items()
        if candidate.layer == "linear"
    }
    return ", ".join(sorted(linear)) or "nothing: the model has none"


def _check_patterns(names: list[str], config: LoraConfig) -> None:
    """Refuse a key that decides nothing: it matches no target, or another key comes first wherever it does."""
    for field_name, patterns in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        deciding = {
            next((key for key in patterns if matches_end(key, name)), None) for name in names
        }
        for key in patterns:
            if key not in deciding:
                raise TargetError(
                    f"{field_name} has {key!r}, which decides for no target; targets here are such as {names[0]}"
                )


def _target(name: str, found: Candidate, config: LoraConfig) -> Target:
    rank, scale = config.rank_of(name), config.scale_of(name)
    return Target(name, found.in_features, found.out_features, rank, scale, found.kind, found.layer)


def _stacks(model: nn.Module, config: LoraConfig) -> list[Target]:
    """Plan the stacked weights of experts, each a target of its own."""
    targets = []
    for path, stacks in expert_targets(unwrapped(model), config.target_parameters).items():
        for stack in stacks:
            name, (experts, out_features, in_features) = (
                f"{path}.{stack}",
                getattr(module_at(model, path), stack).shape,
            )
            found = Candidate(in_features, out_features, "dense", "experts")
            targets.append(replace(_target(name, found, config), experts=experts))
    return targets


def _check_target(target: Target, config: LoraConfig) -> None:
    limit = min(target.in_features, target.out_features)
    if target.rank > limit:
        raise TargetError(
            f"rank {target.rank} exceeds {target.name} of shape {target.out_features}×{target.in_features}; "
            f"use a rank of at most {limit}, or name that module in exclude_modules"
        )
    if target.layer == "embedding" and config.lora_bias:
        raise TargetError(
            f"lora_bias=True has no meaning for the embedding {target.name}; switch it off or leave the embedding out"
        )


def _refuse_second_injection(model: nn.Module) -> None:
    if any(True for _ in adapter_parts(model)):
        raise TargetError(
            "the model already carries an adapter; load a fresh base, or merge the first adapter before adding another"
        )
