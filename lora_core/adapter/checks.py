"""Checks between a config, a model and an adapter's tensors, before a save or a load."""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_core.adapter.json_files import PREFIX
from lora_core.config import LoraConfig
from lora_core.errors import AdapterError
from lora_core.injection import updated_modules, updated_parameters
from lora_core.layers.parameters import parameter_targets
from lora_core.modules import plain_modules
from lora_core.planning import matched_names

EXAMPLES = 3
"""How many modules a warning names."""
ZERO_AT_FIRST = (".lora_B.weight", ".lora_embedding_A")
"""Endings of the keys of factors that are initialized to zero."""


def check_injected(model: nn.Module, config: LoraConfig) -> None:
    """Refuse a config that does not describe the adapter of `model`.

    Otherwise the config would be written next to weights that it does not describe.
    """
    layers = updated_modules(model)
    parameters = updated_parameters(model)
    if not (layers or parameters):
        raise AdapterError("the model carries no adapter; inject one before saving")
    matched = set(matched_names(model, config)) if config.target_modules else set()
    names = parameter_targets(plain_modules(model), config.target_parameters)
    updated = {path: tuple(part.scales) for path, part in parameters.items()}
    if matched != set(layers) or names != updated:
        raise AdapterError(
            f"the config's target_modules={config.target_modules!r} do not match the adapted "
            "modules; pass the config that was injected"
        )
    for name, layer in layers.items():
        _check_layer(name, layer, config)


def _check_layer(name: str, layer: Any, config: LoraConfig) -> None:
    """Refuse a rank or a scale that differs from the config's."""
    rank = config.rank_of(name)
    found = _rank(layer.adapter_tensors(), getattr(layer, "groups", 1))
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


def _rank(tensors: dict[str, nn.Parameter], groups: int) -> Any:
    """Return the rank of both factors, or their shapes if they disagree or are not gathered.

    In a convolution with groups, each output has a part of the rank.
    """
    a, b = list(tensors.values())[:2]
    if a.dim() >= 2 and b.dim() >= 2 and a.shape[0] == groups * b.shape[1]:
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


def warn_of_untrained(tensors: dict[str, Tensor]) -> list[str]:
    """Warn about zero updates next to trained ones: the model did not use these layers.

    Returns:
        The keys of their zero factors, which the sidecar records.
    """
    zero, trained = _zero_and_trained(tensors)
    if not (zero and trained):
        return []
    modules = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in zero})
    named = ", ".join(modules[:EXAMPLES])
    if len(modules) > EXAMPLES:
        named += f" and {len(modules) - EXAMPLES} more"
    warnings.warn(
        f"{len(zero)} updates are zero, of {named}, and {len(trained)} are trained: "
        "the model did not use those layers in training, or their gradients were not gathered; "
        "leave them out of target_modules",
        stacklevel=3,
    )
    return sorted(zero)


def check_trained(tensors: dict[str, Tensor], folder: Path, reported: Collection[str]) -> None:
    """Refuse a partly trained adapter, which a save of sharded tensors leaves behind.

    Args:
        tensors: the tensors of the file.
        folder: for the message.
        reported: keys of the factors that were zero when this library saved the adapter.
    """
    zero, trained = _zero_and_trained(tensors)
    unexpected = [key for key in zero if key not in reported]
    if unexpected and trained:
        raise AdapterError(
            f"{folder} has {len(unexpected)} zero updates, such as {min(unexpected)}, and "
            f"{len(trained)} trained ones; save it again from gathered tensors, or pass "
            "check_trained=False if those layers were never used"
        )


def _zero_and_trained(tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the keys of the factors that start at zero and still are, and of those that are not.

    These are B of a layer and A of an embedding.
    """
    keys = [key for key in tensors if key.endswith(ZERO_AT_FIRST)]
    zero = [key for key in keys if not tensors[key].any()]
    return zero, [key for key in keys if key not in zero]


def path_ends_with(path: str, names: Collection[str]) -> bool:
    """Return whether a module path is one of `names` or ends with one of them."""
    return any(path == name or path.endswith(f".{name}") for name in names)
