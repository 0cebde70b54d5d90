"""Checks between a config, a model and an adapter's tensors, before a save or a load."""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_core.config import LoraConfig
from lora_core.errors import AdapterError
from lora_core.injection import lora_layers
from lora_core.layers.experts import LoraExperts, expert_targets
from lora_core.layers.linear import LoraLayer
from lora_core.modules import adapter_parts, unwrapped
from lora_core.planning import matched_names


def check_injected(model: nn.Module, config: LoraConfig) -> None:
    """Refuse a config that does not describe the adapter of `model`.

    Otherwise the config would be written next to weights that it does not describe.
    """
    layers = dict(lora_layers(model))
    experts = {name for name, part in adapter_parts(model) if isinstance(part, LoraExperts)}
    if not (layers or experts):
        raise AdapterError("the model carries no adapter; inject one before saving")
    matched = set(matched_names(model, config)) if config.target_modules else set()
    matched_experts = set(expert_targets(unwrapped(model), config.target_parameters))
    if matched != set(layers) or matched_experts != experts:
        raise AdapterError(
            f"the config's target_modules={config.target_modules!r} do not match the adapted "
            "modules; pass the config that was injected"
        )
    for name, layer in layers.items():
        _check_layer(name, layer, config)


def _check_layer(name: str, layer: LoraLayer, config: LoraConfig) -> None:
    """Refuse a rank or a scale that differs from the config's."""
    rank = config.rank_of(name)
    found = _rank(layer.adapter_tensors())
    if found != rank:
        raise AdapterError(
            f"{name} has lora_A and lora_B of rank {found}, but the config gives {rank}; "
            "gather them, or pass the config that was injected"
        )
    scale = config.scale_of(name)
    if layer.scale != scale:
        raise AdapterError(
            f"{name} has the scale {layer.scale}, but the config gives {scale}; "
            "pass the config that was injected"
        )


def _rank(tensors: dict[str, nn.Parameter]) -> Any:
    """Return the rank of both factors, or their shapes if they disagree or are not gathered."""
    a, b = list(tensors.values())[:2]
    if a.dim() >= 2 and b.dim() >= 2 and a.shape[0] == b.shape[1]:
        return a.shape[0]
    return (tuple(a.shape), tuple(b.shape))


def check_keys(tensors: dict[str, Tensor], expected: dict[str, nn.Parameter], folder: Path) -> None:
    """Refuse a difference between the file and the model, naming the first of each kind."""
    problems: list[str] = []
    missing = expected.keys() - tensors.keys()
    if missing:
        problems.append(f"{len(missing)} missing, such as {min(missing)}")
    extra = tensors.keys() - expected.keys()
    if extra:
        problems.append(f"{len(extra)} extra, such as {min(extra)}")
    common = expected.keys() & tensors.keys()
    misshapen = [key for key in common if tensors[key].shape != expected[key].shape]
    if misshapen:
        key = min(misshapen)
        found = tuple(tensors[key].shape)
        shape = tuple(expected[key].shape)
        problems.append(
            f"{len(misshapen)} misshapen, such as {key} of {found}, which must be {shape}"
        )
    if problems:
        raise AdapterError(
            f"the tensors of {folder} do not fit this model: {'; '.join(problems)}; "
            "load it on the base it was trained on"
        )


def warn_of_untrained(tensors: dict[str, Tensor]) -> None:
    """Warn about zero updates next to trained ones: the model did not use these layers."""
    zero, trained = _zero_and_trained(tensors)
    if zero and trained:
        warnings.warn(
            f"{len(zero)} updates are zero, such as {min(zero)}, and {len(trained)} are trained: "
            "the model did not use those layers in training; leave them out of target_modules, "
            "or load the adapter with check_trained=False",
            stacklevel=3,
        )


def check_trained(tensors: dict[str, Tensor], folder: Path) -> None:
    """Refuse a partly trained adapter, which a save of sharded tensors leaves behind."""
    zero, trained = _zero_and_trained(tensors)
    if zero and trained:
        raise AdapterError(
            f"{folder} has {len(zero)} zero updates, such as {min(zero)}, and {len(trained)} "
            "trained ones; save it again from gathered tensors, or pass check_trained=False if "
            "those layers were never used"
        )


def _zero_and_trained(tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the keys of the factors B that are zero, and of those that are not."""
    b_keys = [key for key in tensors if key.endswith(".lora_B.weight")]
    zero = [key for key in b_keys if not tensors[key].any()]
    return zero, [key for key in b_keys if key not in zero]


def path_ends_with(path: str, names: Collection[str]) -> bool:
    """Return whether a module path is one of `names` or ends with one of them."""
    return any(path == name or path.endswith(f".{name}") for name in names)
