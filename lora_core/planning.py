"""Plan which modules get an adapter, and its rank and scale, from names and shapes only.

Planning reads the base and changes nothing. It also works on the meta device, where the model takes
no memory. Every pattern of a config must match something: a misspelled pattern is an error instead
of a smaller adapter. `candidates.py` decides what can be adapted, `matching.py` what is named.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn
from torch.distributed.tensor import DTensor

from lora_core.base.sharing import memory_of
from lora_core.candidates import Candidate, find_candidates
from lora_core.config import ALL_LINEAR, LoraConfig, matches_end
from lora_core.coverage import refuse_partial_match
from lora_core.errors import TargetError
from lora_core.layers.expert_layout import supports
from lora_core.layers.parameters import matrices_in, parameter_targets
from lora_core.matching import selected_names, without_excluded
from lora_core.modules import adapter_parts, plain_modules, unwrapped
from lora_core.targets import Layer, Target


def plan_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """Return the modules of `model` that `config` adapts, in model order.

    Args:
        model: without an adapter, on the meta device or any other; not changed.
        config: selects the targets and sets their ranks and scales.

    Raises:
        TargetError: a pattern matches nothing, or a match cannot be adapted.
    """
    _check_not_adapted(model)
    _check_not_divided(model)
    candidates = find_candidates(model)
    targets: list[Target] = []
    if config.target_modules:
        for name in matched_names(model, config):
            target = _make_target(name, candidates[name], config)
            targets.append(target)
    targets += _parameter_targets(model, config)
    target_names = [target.name for target in targets]
    _check_pattern_keys("rank_pattern", config.rank_pattern, target_names)
    _check_pattern_keys("alpha_pattern", config.alpha_pattern, target_names)
    for target in targets:
        _check_target(target, config)
    return targets


def matched_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the paths of the modules that a config selects, in model order.

    Args:
        model: adapted or not.
        config: selects the modules by name.

    Raises:
        TargetError: a pattern matches nothing, or modules that cannot be adapted among others.
    """
    candidates = find_candidates(model)
    names = selected_names(model, config, candidates)
    if config.exclude_modules:
        names = without_excluded(names, config)
    refuse_partial_match(
        config.target_modules,
        names,
        adaptable=candidates,
        modules=plain_modules(model),
    )
    selected = set(names)
    targets = [name for name in candidates if name in selected]
    if config.target_modules == ALL_LINEAR:  # a gate of width 1 has no low-rank update
        targets = [name for name in targets if candidates[name].smaller_side > 1]
    return targets


def adaptable_names(model: nn.Module) -> list[str]:
    """Return the paths of all modules that LoRA can adapt, in model order."""
    return list(find_candidates(model))


def names_before_exclusion(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the paths that a config selects without its `exclude_modules`, adaptable or not.

    Args:
        model: adapted or not.
        config: selects the modules by name.

    Raises:
        TargetError: see `selected_names`.
    """
    candidates = find_candidates(model)
    return selected_names(model, config, candidates)


def named_modules(model: nn.Module, names: Iterable[str], what: str) -> dict[str, nn.Module]:
    """Return the modules that a setting names, by path.

    As in PEFT, a name matches every path that ends with it: `norm` matches `input_layernorm` too.

    Args:
        model: adapted or not.
        names: paths or endings of paths.
        what: name of the setting, for the message.

    Raises:
        TargetError: a name matches no module.
    """
    plain = plain_modules(model)
    found: dict[str, nn.Module] = {}
    for name in names:
        matches = {path: module for path, module in plain.items() if path.endswith(name)}
        if not matches:
            raise TargetError(
                f"{what} names {name!r}, which matches no module; "
                "use the path of a module or the end of it"
            )
        found |= matches
    return found


def users_of_weight(model: nn.Module, module: nn.Module) -> dict[str, nn.Module]:
    """Return the other modules that have the weight of a module, by path.

    Args:
        model: contains them.
        module: one with a weight.
    """
    memory = memory_of(module.weight)
    users: dict[str, nn.Module] = {}
    for path, other in plain_modules(model).items():
        weight = other._parameters.get("weight")
        if other is module or weight is None:
            continue
        if memory_of(weight) == memory:
            users[path] = other
    return users


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
    """Return the key that applies to the path `name`."""
    for key in patterns:
        if matches_end(key, name):
            return key
    return None


def _make_target(name: str, candidate: Candidate, config: LoraConfig) -> Target:
    """Return a candidate with the rank and the scale that the config sets for its path."""
    rank = config.rank_of(name)
    return Target(
        name=name,
        in_features=candidate.in_features,
        out_features=candidate.out_features,
        rank=rank,
        scale=config.scale_of(name),
        kind=candidate.kind,
        layer=candidate.layer,
        groups=candidate.groups,
        extra_weights=_extra_weights(candidate, rank),
    )


def _extra_weights(candidate: Candidate, rank: int) -> int:
    """Return the trained weights of attention's output projection, (in, in), else 0."""
    if candidate.layer != "attention":
        return 0
    return 2 * rank * candidate.in_features


def _parameter_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """Plan the updates of named parameters, such as stacks of experts; one target per parameter."""
    targets = []
    modules = plain_modules(model)
    for path, names in parameter_targets(modules, config.target_parameters).items():
        module = modules[path]
        layer: Layer = "experts" if supports(module) else "parameter"
        for name in names:
            stack = matrices_in(module, name)
            candidate = Candidate(
                in_features=stack.in_features,
                out_features=stack.out_features,
                kind="dense",
                layer=layer,
            )
            target = _make_target(f"{path}.{name}", candidate, config)
            target = replace(target, experts=stack.experts)
            targets.append(target)
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


def _check_not_divided(model: nn.Module) -> None:
    """Raise if each process holds only a part of a weight, of whose complete size A and B are."""
    for name, parameter in unwrapped(model).named_parameters():
        if isinstance(parameter, DTensor):
            raise TargetError(
                f"{name} is divided among processes ({parameter.placements}), as by a "
                "tensor-parallel plan or fully_shard, and an adapter needs complete weights; load "
                "the base without tp_plan, or adapt it before it is divided"
            )
