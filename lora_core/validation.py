"""Plan an adapter that is yet to be trained, and refuse every setting that would decide nothing about it.

An adapter that is read from files is planned more leniently (`plan_targets`): what had no effect on its training takes
nothing from it.
"""

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from lora_core.config import LoraConfig
from lora_core.errors import TargetError
from lora_core.init.spectral import is_spectral
from lora_core.planning import matched_names, plan_targets
from lora_core.targets import Target


def plan_adapter(model: nn.Module, config: LoraConfig) -> list[Target]:
    """List the modules of `model` that `config` adapts, as `plan_targets` does; nothing is changed.

    Raises:
        TargetError: see `plan_targets`, or a setting has no effect on the targets.
    """
    targets = plan_targets(model, config)
    _check_parameters(config)
    _check_names(config, [target.name for target in targets])
    _check_exclusions(model, config)
    _check_only_embeddings(config, targets)
    for target in targets:
        _check_start(config, target)
    return targets


def _check_parameters(config: LoraConfig) -> None:
    """Refuse what chooses among modules where parameters are adapted, which are chosen by their own names."""
    if config.target_parameters and config.layers_to_transform:
        raise TargetError(
            f"layers_to_transform={config.layers_to_transform!r} has no effect on target_parameters; name these by their whole paths"
        )
    if config.exclude_modules and not config.target_modules:
        raise TargetError(
            f"exclude_modules={config.exclude_modules!r} has no effect on target_parameters; leave it out"
        )


def _check_names(config: LoraConfig, names: list[str]) -> None:
    """Refuse a target of which exclusions and the choice of blocks leave nothing."""
    for one in config.target_modules if isinstance(config.target_modules, tuple) else ():
        if not _names_any(one, names):
            raise TargetError(
                f"target {one!r} has no effect: exclude_modules and layers_to_transform leave nothing of it; leave it out"
            )


def _check_exclusions(model: nn.Module, config: LoraConfig) -> None:
    """Refuse a name that excludes nothing beside others that do."""
    if isinstance(config.exclude_modules, str) or len(config.exclude_modules) < 2:
        return  # what excludes nothing by itself is refused by `plan_targets`
    names = matched_names(model, replace(config, exclude_modules=()))
    for one in config.exclude_modules:
        if not _names_any(one, names):
            raise TargetError(
                f"exclude_modules names {one!r}, which is no target and so leaves out nothing; check its spelling"
            )


def _check_only_embeddings(config: LoraConfig, targets: list[Target]) -> None:
    """Refuse what acts on other layers than embeddings, where there are no others."""
    if any(target.layer != "embedding" for target in targets):
        return
    if config.lora_dropout:
        raise TargetError(
            f"lora_dropout={config.lora_dropout!r} has no effect: an embedding reads no input that could be dropped; use 0"
        )
    if config.init_lora_weights == "gaussian":
        raise TargetError(
            "init_lora_weights='gaussian' has no effect: embeddings start from normal draws anyway; use 'kaiming'"
        )


def _check_start(config: LoraConfig, target: Target) -> None:
    """Refuse a start that the target's kind of layer does not know, or that its saved form would not fit."""
    method, shape = config.init_lora_weights, f"{target.out_features}×{target.in_features}"
    if target.layer not in _starting(method):
        raise TargetError(
            f"init_lora_weights={method!r} has no effect on {target.name} ({target.layer}); use 'kaiming', or leave that module out"
        )
    if is_spectral(method) and 2 * target.rank > min(target.in_features, target.out_features):
        raise TargetError(
            f"init_lora_weights={method!r} doubles the rank of the saved adapter, and twice {target.rank} exceeds {target.name} of "
            f"shape {shape}; halve the rank"
        )


def _starting(method: str) -> tuple[str, ...]:
    """Return the kinds of layers that know a start."""
    if method == "eva" or is_spectral(method):
        return ("linear",)
    return (
        ("linear", "conv2d")
        if method == "orthogonal"
        else ("linear", "conv2d", "embedding", "experts")
    )


def _names_any(one: str, names: Iterable[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for name in names)
