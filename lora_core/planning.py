"""Plan which modules get an adapter, and its rank and scale, from names and shapes only.

Planning reads the base and changes nothing. It also works on the meta device, where the model takes
no memory. Every pattern of a config must match something: a misspelled pattern is an error instead
of a smaller adapter.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from lora_core.base.quant import base_weight
from lora_core.base.sharing import memory_of
from lora_core.config import ALL_LINEAR, LoraConfig, Names, matches_end
from lora_core.coverage import has_own_weight, refuse_partial_match
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
    """A module that LoRA can adapt."""

    in_features: int
    out_features: int
    kind: str
    layer: Layer

    @property
    def smaller_side(self) -> int:
        """The largest possible rank of an update."""
        return min(self.in_features, self.out_features)


def plan_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """Return the modules of `model` that `config` adapts, in model order; the model is unchanged.

    Raises:
        TargetError: a pattern matches nothing, or a match cannot be adapted.
    """
    _check_not_adapted(model)
    candidates = _find_candidates(model)
    targets: list[Target] = []
    if config.target_modules:
        for name in matched_names(model, config):
            targets.append(_make_target(name, candidates[name], config))
    targets += _expert_stack_targets(model, config)
    target_names = [target.name for target in targets]
    _check_pattern_keys("rank_pattern", config.rank_pattern, target_names)
    _check_pattern_keys("alpha_pattern", config.alpha_pattern, target_names)
    for target in targets:
        _check_target(target, config)
    return targets


def matched_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the paths of the modules that `config` selects in a model, whether adapted or not.

    Raises:
        TargetError: a pattern matches nothing, or modules that cannot be adapted among others.
    """
    candidates = _find_candidates(model)
    names = _selected_names(model, config, candidates)
    if config.exclude_modules:
        names = _without_excluded(names, config)
    refuse_partial_match(
        config.target_modules, names, adaptable=candidates, modules=plain_modules(model)
    )
    targets = [name for name in candidates if name in set(names)]
    if config.target_modules == ALL_LINEAR:  # a gate of width 1 has no low-rank update
        targets = [name for name in targets if candidates[name].smaller_side > 1]
    return targets


def adaptable_names(model: nn.Module) -> list[str]:
    """Return the paths of all modules that LoRA can adapt, in model order."""
    return list(_find_candidates(model))


def names_before_exclusion(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the paths that `config` selects without its `exclude_modules`, adaptable or not."""
    return _selected_names(model, config, _find_candidates(model))


def _selected_names(
    model: nn.Module, config: LoraConfig, candidates: Mapping[str, Candidate]
) -> list[str]:
    if config.target_modules == ALL_LINEAR:
        names = _all_linear_names(model, candidates, config)
    else:
        names = _names_matching(config.target_modules, model, candidates)
    if config.layers_to_transform:
        names = _names_in_blocks(names, config.layers_to_transform)
    return names


def _without_excluded(names: list[str], config: LoraConfig) -> list[str]:
    left = [name for name in names if not _is_named(name, config.exclude_modules)]
    if not left or len(left) == len(names):
        raise TargetError(
            f"exclude_modules={config.exclude_modules!r} leaves {len(left)} of {len(names)} "
            "targets; it must exclude some but not all"
        )
    return left


def named_modules(model: nn.Module, names: Iterable[str], what: str) -> dict[str, nn.Module]:
    """Return the modules that `names` select, by path; each name is a path or a path suffix.

    Raises:
        TargetError: a name matches no module; `what` is the name of the setting.
    """
    plain = plain_modules(model)
    found: dict[str, nn.Module] = {}
    for name in names:
        matches = {path: module for path, module in plain.items() if _is_named(path, (name,))}
        if not matches:
            raise TargetError(
                f"{what} names {name!r}, which matches no module; "
                "use the path of a module or the last part of it"
            )
        found |= matches
    return found


def users_of_weight(model: nn.Module, module: nn.Module) -> dict[str, nn.Module]:
    """Return the other modules of `model` that have the weight of `module`, by path."""
    key = memory_of(module.weight)
    users: dict[str, nn.Module] = {}
    for path, other in plain_modules(model).items():
        weight = other._parameters.get("weight")
        if other is not module and weight is not None and memory_of(weight) == key:
            users[path] = other
    return users


def block_number(name: str) -> int | None:
    """Return the first number in a module's path: the index of its block in any common model."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None


def _find_candidates(model: nn.Module) -> dict[str, Candidate]:
    found = {}
    for name, module in plain_modules(model).items():
        candidate = _make_candidate(module)
        if candidate is not None and name:  # the root has no parent in which to replace it
            found[name] = candidate
    return found


def _make_candidate(module: nn.Module) -> Candidate | None:
    if not has_own_weight(module):
        return None
    if type(module) is nn.Conv2d:
        kernel_positions = module.kernel_size[0] * module.kernel_size[1]
        in_features = module.in_channels // module.groups * kernel_positions
        return Candidate(in_features, module.out_channels, "dense", "conv2d")
    if isinstance(module, nn.Embedding):
        return Candidate(module.num_embeddings, module.embedding_dim, "dense", "embedding")
    weight = base_weight(module)
    if weight is None:
        return None
    out_features, in_features = weight.shape
    return Candidate(in_features, out_features, weight.kind, "linear")


def _all_linear_names(
    model: nn.Module, candidates: Mapping[str, Candidate], config: LoraConfig
) -> list[str]:
    """Return all linear layers of the language model except its head and fully trained modules.

    They include linear layers that compute their weight, which `matched_names` refuses. Other
    modules of a multimodal model are adapted only if they are named.
    """
    head = output_head(unwrapped(model))
    plain = plain_modules(model)
    towers = tuple(f"{name}." for name in modules_outside_language_model(model))
    names = []
    for name, module in plain.items():
        candidate = candidates.get(name)
        is_linear = candidate is not None and candidate.layer == "linear"
        is_computed = isinstance(module, nn.Linear) and not has_own_weight(module)
        is_left_out = module is head or _is_named(name, config.modules_to_save)
        is_outside = f"{name}.".startswith(towers)
        if (is_linear or is_computed) and not (is_left_out or is_outside):
            names.append(name)
    if not names:
        in_language_model = {
            name: candidate
            for name, candidate in candidates.items()
            if not f"{name}.".startswith(towers)
        }
        raise TargetError(
            f"target_modules={ALL_LINEAR!r} matches no linear layer; "
            f"linear layers here end in {_linear_endings(in_language_model)}"
        )
    return names


def _names_matching(
    patterns: Names, model: nn.Module, candidates: Mapping[str, Candidate]
) -> list[str]:
    """Return the modules that any of the patterns matches, in model order."""
    paths = list(plain_modules(model))
    chosen: set[str] = set()
    rules: list[Names] = [patterns] if isinstance(patterns, str) else [(one,) for one in patterns]
    for rule in rules:
        chosen.update(_matches(rule, paths, candidates))
    return [path for path in paths if path in chosen]


def _is_named(name: str, names: Names) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(is_path_or_suffix(one, name) for one in names)


def is_path_or_suffix(pattern: str, path: str) -> bool:
    """Return whether `pattern` is a module's path or the last part of it."""
    return path == pattern or path.endswith(f".{pattern}")


def _matches(rule: Names, paths: list[str], candidates: Mapping[str, Candidate]) -> list[str]:
    """Return the matches of one pattern; raise if LoRA can adapt none of them."""
    matches = [path for path in paths if _is_named(path, rule)]
    if not any(path in candidates for path in matches):
        pattern = rule if isinstance(rule, str) else rule[0]
        problem = "matches no module"
        if matches:
            problem = f"matches {matches[0]}, which cannot be adapted"
        raise TargetError(
            f"target {pattern!r} {problem}; linear layers here end in {_linear_endings(candidates)}"
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


def _linear_endings(candidates: Mapping[str, Candidate]) -> str:
    endings = set()
    for name, candidate in candidates.items():
        if candidate.layer == "linear":
            endings.add(name.rpartition(".")[2])
    return ", ".join(sorted(endings)) or "nothing: the model has none"


def _check_pattern_keys(field_name: str, patterns: Mapping[str, object], names: list[str]) -> None:
    """Raise for a key without effect: no target matches it, or an earlier key takes precedence."""
    effective = {_first_matching_key(patterns, name) for name in names}
    for key in patterns:
        if key not in effective:
            raise TargetError(
                f"{field_name} has {key!r}, which applies to no target; "
                f"an example of a target here is {names[0]}"
            )


def _first_matching_key(patterns: Mapping[str, object], name: str) -> str | None:
    for key in patterns:
        if matches_end(key, name):
            return key
    return None


def _make_target(name: str, candidate: Candidate, config: LoraConfig) -> Target:
    return Target(
        name=name,
        in_features=candidate.in_features,
        out_features=candidate.out_features,
        rank=config.rank_of(name),
        scale=config.scale_of(name),
        kind=candidate.kind,
        layer=candidate.layer,
    )


def _expert_stack_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """Plan the stacked weights of experts, one target per stack."""
    targets = []
    for path, stacks in expert_targets(unwrapped(model), config.target_parameters).items():
        module = module_at(model, path)
        for stack in stacks:
            experts, out_features, in_features = getattr(module, stack).shape
            candidate = Candidate(in_features, out_features, "dense", "experts")
            target = _make_target(f"{path}.{stack}", candidate, config)
            targets.append(replace(target, experts=experts))
    return targets


def _check_target(target: Target, config: LoraConfig) -> None:
    if target.layer == "embedding" and config.lora_bias:
        raise TargetError(
            f"lora_bias=True has no meaning for the embedding {target.name}; "
            "disable it or exclude the embedding"
        )


def _check_not_adapted(model: nn.Module) -> None:
    if next(adapter_parts(model), None) is not None:
        raise TargetError(
            "the model already carries an adapter; load a fresh base, "
            "or merge the first adapter before adding another"
        )
