"""Inject an adapter into a model: plan and check, build the parts, then insert all of them."""

from collections.abc import Iterator, Mapping
from typing import cast

from torch import nn

from lora_core.base.quant import disable_cpu_repacking
from lora_core.base.sharing import memory_of
from lora_core.calibration.data_driven import Original, check_init_inputs, initialize_from_inputs
from lora_core.calibration.eva import Batches
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
"""Module path → the part that replaces the module."""


def inject(
    model: nn.Module,
    config: LoraConfig,
    *,
    seed: int,
    data: Batches | None = None,
    original: Original | None = None,
) -> list[Target]:
    """Inject the adapter that `config` describes, freeze the rest, and return the targets.

    Before training, the model computes the same as before: bit for bit, or up to rounding under
    DoRA and with initializations in which B is not zero. Only `loftq` changes the output, towards
    the base before quantization.

    Args:
        model: changed in place; on an error it is unchanged.
        config: the adapter.
        seed: seed of every initialization.
        data: only for init_lora_weights='eva': calls that each run one batch through `model`.
        original: only for init_lora_weights='loftq': module path → its weight before quantization.

    Raises:
        TargetError: see `plan_adapter`; the model is unchanged.
        ConfigError: `data` or `original` is missing, has no effect, or does not fit; the model
            is unchanged.
    """
    check_init_inputs(config, data, original)
    targets = plan_adapter(model, config)
    parts = _build_uninitialized_parts(model, config, targets, seed)
    linear_layers = {name: part for name, part in parts.items() if isinstance(part, LoraLinear)}
    initialize_from_inputs(model, linear_layers, data, original)
    place_parts(model, parts)
    return targets


def build_parts(model: nn.Module, config: LoraConfig, targets: list[Target], seed: int) -> Parts:
    """Build all parts of an adapter over the modules of `model`, which is not changed.

    Raises:
        ConfigError: the initialization needs data or original weights; see `set_initialization`.
        TargetError: a setting has no effect, or two settings select the same module.
    """
    check_init_inputs(config, None, None)
    return _build_uninitialized_parts(model, config, targets, seed)


def _build_uninitialized_parts(
    model: nn.Module, config: LoraConfig, targets: list[Target], seed: int
) -> Parts:
    """Build the parts; a data-driven initialization is not applied yet."""
    layers: Parts = {}
    for target in targets:
        if target.layer != "experts":
            module = module_at(model, target.name)
            layers[target.name] = _build_layer(module, target, config, seed)
    saved = named_modules(model, config.modules_to_save, "modules_to_save")
    full_modules: Parts = {name: TrainedModule(module, name) for name, module in saved.items()}
    rows = _build_rows(model, config.trainable_token_indices)
    experts = _build_experts(model, config, seed)
    _check_no_overlap(layers, full_modules, rows, experts)
    parts = {**layers, **full_modules, **rows, **experts}
    return {**parts, **_build_biases(model, config, parts)}


def place_parts(model: nn.Module, parts: Parts) -> None:
    """Freeze `model` and insert the parts."""
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
    """Return the number of trainable weights."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _build_layer(module: nn.Module, target: Target, config: LoraConfig, seed: int) -> nn.Module:
    layer: LoraLinear | LoraEmbedding | LoraConv2d
    if isinstance(module, nn.Embedding):
        layer = LoraEmbedding(module, target, config)
    elif isinstance(module, nn.Conv2d):
        layer = LoraConv2d(module, target, config)
    else:
        layer = LoraLinear(module, target, config)
    layer.reset(target.name, config, seed)
    return layer


def _build_experts(model: nn.Module, config: LoraConfig, seed: int) -> Parts:
    """Build the updates of stacked experts; as in PEFT, they support random initialization only."""
    if config.target_parameters and (config.use_dora or config.lora_bias):
        raise TargetError("target_parameters take neither use_dora nor lora_bias; disable these")
    parts: Parts = {}
    for path, stacks in expert_targets(unwrapped(model), config.target_parameters).items():
        sizes = {}
        for stack in stacks:
            name = f"{path}.{stack}"
            sizes[stack] = (config.rank_of(name), config.scale_of(name))
        part = LoraExperts(module_at(model, path), sizes)
        part.reset(path, config.init_lora_weights, seed)
        parts[path] = part
    return parts


def _build_rows(model: nn.Module, rows_by_name: Mapping[str, tuple[int, ...]]) -> Parts:
    """Build the trained rows of embeddings, and the heads that share the storage of one."""
    parts: Parts = {}
    path_of = {module: path for path, module in plain_modules(model).items()}
    for name, rows in rows_by_name.items():
        head = output_head(unwrapped(model))
        for path, module in named_modules(model, [name], "trainable_token_indices").items():
            trained = TrainedRows(module, path, rows)
            parts[path] = trained
            if head is not None and _is_tied(head, module):
                parts[path_of[head]] = TiedHead(head, trained)
    return parts


def _is_tied(head: nn.Module, embedding: nn.Module) -> bool:
    """Return whether `head` is another module that shares the storage of the embedding."""
    return head is not embedding and memory_of(head.weight) == memory_of(embedding.weight)


def _build_biases(model: nn.Module, config: LoraConfig, parts: Parts) -> Parts:
    """Build the trained biases of modules outside all parts; layers train their own biases."""
    if config.bias == "none":
        return {}
    modules = _biased_modules_outside(parts, model) if config.bias == "all" else {}
    if not modules and not any(map(_trains_bias, parts.values())):
        raise TargetError(
            f"bias={config.bias!r} has no effect: none of the selected modules has a bias; "
            "use 'none'"
        )
    for name in modules:
        inner = _names_inside(name, [*parts, *modules])
        if inner:
            raise TargetError(
                f"bias='all' would train the bias of {name} around {inner[0]}, "
                "which is trained as well; use 'lora_only'"
            )
    return {name: TrainedBias(module) for name, module in modules.items()}


def _trains_bias(part: nn.Module) -> bool:
    return getattr(part, "trained_bias", None) is not None


def _biased_modules_outside(parts: Parts, model: nn.Module) -> dict[str, nn.Module]:
    found = {}
    for name, module in plain_modules(model).items():
        has_bias = isinstance(module._parameters.get("bias"), nn.Parameter)
        if has_bias and not _is_inside(name, parts):
            found[name] = module
    return found


def _names_inside(name: str, names: list[str]) -> list[str]:
    return [other for other in names if other.startswith(f"{name}.")]


def _is_inside(name: str, parts: Parts) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in parts)


def _check_no_overlap(*groups: Parts) -> None:
    """Raise if two settings select a module, or a module inside another trained one."""
    names = [name for group in groups for name in group]
    for name in names:
        outer = [other for other in names if other != name and name.startswith(f"{other}.")]
        if names.count(name) > 1 or outer:
            container = outer[0] if outer else name
            raise TargetError(
                f"{name} is named by two settings, or is inside {container}, "
                "which is fully trained; name it once"
            )
