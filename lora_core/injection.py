"""Put an adapter into a model: a plan that can refuse, parts that are built aside, and an act that cannot half-fail."""

from collections.abc import Iterator, Mapping
from typing import cast

from torch import nn

from lora_core.base.quant import disable_cpu_repacking
from lora_core.base.sharing import memory_of
from lora_core.calibration.eva import Batches
from lora_core.calibration.given import Original, check_given, start_given
from lora_core.config import LoraConfig
from lora_core.errors import TargetError
from lora_core.layers.conv import LoraConv2d
from lora_core.layers.embedding import LoraEmbedding
from lora_core.layers.experts import LoraExperts, expert_targets
from lora_core.layers.linear import LoraLayer, LoraLinear
from lora_core.layers.trained import TiedHead, TrainedBias, TrainedModule, TrainedRows
from lora_core.modules import (
    adapter_parts,
    module_at,
    output_head,
    plain_modules,
    replace_module,
    unwrapped,
)
from lora_core.planning import named_modules
from lora_core.targets import Target
from lora_core.validation import plan_adapter

LAYERS = (LoraLinear, LoraEmbedding, LoraConv2d)
Parts = dict[str, nn.Module]
"""Module path → the part that stands in the module's place."""


def inject(
    model: nn.Module,
    config: LoraConfig,
    *,
    seed: int,
    data: Batches | None = None,
    original: Original | None = None,
) -> list[Target]:
    """Put the adapter that `config` describes into `model` and freeze the rest; return the plan of its updates.

    The model computes what it computed before until something is trained: bit for bit, and up to a rounding under DoRA
    and with starts in which B is not zero. Only `loftq` is there to change it, towards the base before it was rounded.

    Args:
        model: changed in place, wholly or not at all.
        config: the adapter.
        seed: draws every start.
        data: for init_lora_weights='eva', and for no other: calls that each push one batch through `model`.
        original: for init_lora_weights='loftq', and for no other: module path → its weight before it was rounded.

    Raises:
        TargetError: see `plan_adapter`; the model is unchanged.
        ConfigError: `data` or `original` is missing, has no effect, or does not fit; the model is unchanged.
    """
    check_given(config, data, original)
    targets = plan_adapter(model, config)
    parts = _parts(model, config, targets, seed)
    start_given(
        model,
        {name: part for name, part in parts.items() if isinstance(part, LoraLinear)},
        data,
        original,
    )
    place_parts(model, parts)
    return targets


def build_parts(model: nn.Module, config: LoraConfig, targets: list[Target], seed: int) -> Parts:
    """Build everything an adapter consists of, over the modules of `model`, which is not changed.

    Raises:
        ConfigError: the config's start has to be found first; see `set_starts`.
        TargetError: a setting has no effect, or two settings want the same module.
    """
    check_given(config, None, None)
    return _parts(model, config, targets, seed)


def _parts(model: nn.Module, config: LoraConfig, targets: list[Target], seed: int) -> Parts:
    """Build the parts; a start that is given is still to be put into them."""
    layers = {
        one.name: _layer(module_at(model, one.name), one, config, seed)
        for one in targets
        if one.layer != "experts"
    }
    saved = named_modules(model, config.modules_to_save, "modules_to_save")
    wholes: Parts = {name: TrainedModule(module, name) for name, module in saved.items()}
    rows = _rows(model, config.trainable_token_indices)
    experts = _experts(model, config, seed)
    _refuse_twice(layers, wholes, rows, experts)
    parts = {**layers, **wholes, **rows, **experts}
    return {**parts, **_biases(model, config, parts)}


def place_parts(model: nn.Module, parts: Parts) -> None:
    """Freeze `model` and put the parts into it."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    disable_cpu_repacking(model)
    for name, part in parts.items():
        replace_module(model, name, part)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield each low-rank update with the path of the module it wraps, in model order."""
    for name, part in adapter_parts(model):
        if isinstance(part, LAYERS):
            yield name, cast(LoraLayer, part)


def trained_weights(model: nn.Module) -> int:
    """Count the weights that an optimiser would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _layer(module: nn.Module, target: Target, config: LoraConfig, seed: int) -> nn.Module:
    layer: LoraLinear | LoraEmbedding | LoraConv2d
    if isinstance(module, nn.Embedding):
        layer = LoraEmbedding(module, target, config)
    elif isinstance(module, nn.Conv2d):
        layer = LoraConv2d(module, target, config)
    else:
        layer = LoraLinear(module, target, config)
    layer.reset(target.name, config, seed)
    return layer


def _experts(model: nn.Module, config: LoraConfig, seed: int) -> Parts:
    """Build the updates of stacked experts; like PEFT's, they know plain starts alone."""
    if config.target_parameters and (config.use_dora or config.lora_bias):
        raise TargetError("target_parameters take neither use_dora nor lora_bias; switch these off")
    parts: Parts = {}
    for path, stacks in expert_targets(unwrapped(model), config.target_parameters).items():
        sizes = {
            stack: (config.rank_of(f"{path}.{stack}"), config.scale_of(f"{path}.{stack}"))
            for stack in stacks
        }
        parts[path] = part = LoraExperts(module_at(model, path), sizes)
        part.reset(path, config.init_lora_weights, seed)
    return parts


def _rows(model: nn.Module, wanted: Mapping[str, tuple[int, ...]]) -> Parts:
    """Build the trained rows of embeddings; a head that is tied to one, by its very storage, follows."""
    parts: Parts = {}
    plain = plain_modules(model)
    for name, rows in wanted.items():
        for path, module in named_modules(model, [name], "trainable_token_indices").items():
            trained = parts[path] = TrainedRows(module, path, rows)
            head = output_head(unwrapped(model))
            if (
                head is not None
                and head is not module
                and memory_of(head.weight) == memory_of(module.weight)
            ):
                parts[next(other for other, one in plain.items() if one is head)] = TiedHead(
                    head, trained
                )
    return parts


def _biases(model: nn.Module, config: LoraConfig, parts: Parts) -> Parts:
    """Build the trained biases of modules that have no part of their own; the layers train theirs themselves."""
    if config.bias == "none":
        return {}
    biased = {
        name: m
        for name, m in plain_modules(model).items()
        if isinstance(m._parameters.get("bias"), nn.Parameter)
    }
    free = {
        name: module
        for name, module in biased.items()
        if config.bias == "all" and not _lies_in(name, parts)
    }
    if not free and all(getattr(part, "trained_bias", None) is None for part in parts.values()):
        raise TargetError(
            f"bias={config.bias!r} has no effect: none of the modules it means has a bias; use 'none'"
        )
    for name in free:
        inner = [other for other in (*parts, *free) if other.startswith(f"{name}.")]
        if inner:
            raise TargetError(
                f"bias='all' would train the bias of {name} around {inner[0]}, which is trained as well; use 'lora_only'"
            )
    return {name: TrainedBias(module) for name, module in free.items()}


def _lies_in(name: str, parts: Parts) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in parts)


def _refuse_twice(*groups: Parts) -> None:
    """Refuse a module that two settings name, or that lies inside another that is trained."""
    names = [name for group in groups for name in group]
    for name in names:
        outer = [other for other in names if other != name and name.startswith(f"{other}.")]
        if names.count(name) > 1 or outer:
            raise TargetError(
                f"{name} is named by two settings, or lies in {(outer or [name])[0]}, which is trained whole; name it once"
            )
