"""Plan a new adapter, and raise for every setting that would have no effect on it.

Adapters that are loaded from files are planned without these checks (`plan_targets`): a setting
that had no effect on their training does no harm.
"""

from collections.abc import Iterable
from typing import get_args

from torch import nn

from lora_core.config import LoraConfig
from lora_core.errors import TargetError
from lora_core.init.spectral import is_spectral
from lora_core.matching import is_path_or_suffix
from lora_core.planning import names_before_exclusion, plan_targets
from lora_core.targets import CONVOLUTIONS, Layer, Target


def plan_adapter(model: nn.Module, config: LoraConfig) -> list[Target]:
    """Return the modules of `model` that `config` adapts: `plan_targets` with stricter checks.

    Args:
        model: without an adapter; not changed.
        config: of the new adapter.

    Raises:
        TargetError: see `plan_targets`, or a setting has no effect on the targets.
    """
    targets = plan_targets(model, config)
    _check_parameters(config)
    _check_target_names(config, [target.name for target in targets])
    _check_exclusions(model, config)
    _check_only_embeddings(config, targets)
    for target in targets:
        _check_rank(target)
        _check_init(config, target)
    return targets


def _check_parameters(config: LoraConfig) -> None:
    """Raise for settings that select modules if parameters are adapted, which only names select."""
    if config.target_parameters and config.layers_to_transform:
        raise TargetError(
            f"layers_to_transform={config.layers_to_transform!r} has no effect on "
            "target_parameters; name these by their full paths"
        )
    if config.exclude_modules and not config.target_modules:
        raise TargetError(
            f"exclude_modules={config.exclude_modules!r} has no effect on target_parameters; "
            "leave it out"
        )


def _check_target_names(config: LoraConfig, names: list[str]) -> None:
    """Raise if exclude_modules and layers_to_transform remove all matches of a target."""
    if isinstance(config.target_modules, str):
        return
    for target in config.target_modules:
        if not _matches_any(target, names):
            raise TargetError(
                f"target {target!r} has no effect: exclude_modules and layers_to_transform "
                "leave nothing of it; leave it out"
            )


def _check_exclusions(model: nn.Module, config: LoraConfig) -> None:
    """Raise for a name that excludes nothing if other names do."""
    if isinstance(config.exclude_modules, str) or len(config.exclude_modules) < 2:
        return  # `plan_targets` raises for a single name without effect
    names = names_before_exclusion(model, config)
    for excluded in config.exclude_modules:
        if not _matches_any(excluded, names):
            raise TargetError(
                f"exclude_modules names {excluded!r}, which is not a target, so it excludes "
                "nothing; check its spelling"
            )


def _check_only_embeddings(config: LoraConfig, targets: list[Target]) -> None:
    """Raise for settings without effect on embeddings if there are no other targets."""
    if config.lora_dropout and all(target.layer == "attention" for target in targets):
        raise TargetError(
            f"lora_dropout={config.lora_dropout!r} has no effect on nn.MultiheadAttention, which "
            "computes with the updated weights; use 0"
        )
    if any(target.layer != "embedding" for target in targets):
        return
    if config.lora_dropout:
        raise TargetError(
            f"lora_dropout={config.lora_dropout!r} has no effect: an embedding has no input "
            "that could be dropped; use 0"
        )
    if config.init_lora_weights == "gaussian":
        raise TargetError(
            "init_lora_weights='gaussian' has no effect: embeddings are always initialized "
            "from a normal distribution; use 'kaiming'"
        )


def _check_rank(target: Target) -> None:
    """Raise for a rank that no update of the layer can have."""
    limit = min(target.in_features, target.out_features)
    if target.rank > limit:
        raise TargetError(
            f"rank {target.rank} exceeds {target.name} of shape "
            f"{target.out_features}×{target.in_features}; use a rank of at most "
            f"{limit}, or name that module in exclude_modules"
        )


def _check_init(config: LoraConfig, target: Target) -> None:
    """Raise if the layer does not support the initialization, or its saved form would not fit."""
    method = config.init_lora_weights
    if target.layer not in _layers_supporting(method):
        raise TargetError(
            f"init_lora_weights={method!r} has no effect on {target.name} ({target.layer}); "
            "use 'kaiming', or exclude that module"
        )
    if is_spectral(method) and 2 * target.rank > min(target.in_features, target.out_features):
        raise TargetError(
            f"init_lora_weights={method!r} doubles the rank of the saved adapter, and twice "
            f"{target.rank} exceeds {target.name} of shape "
            f"{target.out_features}×{target.in_features}; halve the rank"
        )


def _layers_supporting(method: str) -> tuple[str, ...]:
    """Return the kinds of layers that support an initialization."""
    if method == "eva" or is_spectral(method):
        return ("linear",)
    if method == "orthogonal":
        return ("linear", *CONVOLUTIONS)
    return get_args(Layer)


def _matches_any(suffix: str, names: Iterable[str]) -> bool:
    return any(is_path_or_suffix(suffix, name) for name in names)
