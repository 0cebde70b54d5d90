"""Inject an adapter into a model: plan and check, build the parts, then insert all of them."""

from collections.abc import Iterator, Mapping
from typing import cast

from torch import nn

from lora_core.base.quant import base_weight, check_computes_linear, disable_cpu_repacking
from lora_core.calibration.data_driven import Original, check_init_inputs, initialize_from_inputs
from lora_core.calibration.eva import Batches
from lora_core.config import LoraConfig
from lora_core.coverage import computing_embeddings, refuse_computed, refuse_unused_copy
from lora_core.errors import TargetError
from lora_core.layers.conv import KINDS, LoraConv
from lora_core.layers.embedding import LoraEmbedding
from lora_core.layers.expert_layout import supports
from lora_core.layers.experts import LoraExperts
from lora_core.layers.linear import LoraLayer, LoraLinear
from lora_core.layers.multihead_attention import LoraAttention
from lora_core.layers.parameters import LoraParameters, parameter_targets
from lora_core.layers.trained import (
    TiedEmbedding,
    TiedHead,
    TrainedBias,
    TrainedModule,
    TrainedRows,
)
from lora_core.left_out import warn_of_left_out
from lora_core.modules import (
    adapter_parts,
    module_at,
    plain_modules,
    replace_module,
)
from lora_core.planning import named_modules, users_of_weight
from lora_core.saving import guard_methods
from lora_core.targets import OF_PARAMETERS, Target
from lora_core.validation import plan_adapter

LAYERS = (LoraLinear, LoraEmbedding, LoraConv)
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

    What `all-linear` leaves out, such as experts, is logged as a warning.

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
    warn_of_left_out(model, config)
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
        if target.layer not in OF_PARAMETERS:
            module = module_at(model, target.name)
            layers[target.name] = _build_layer(module, target, config, seed)
    saved = named_modules(model, config.modules_to_save, "modules_to_save")
    for name, module in saved.items():
        if isinstance(module, nn.Embedding):
            refuse_unused_copy(name, _computing_embeddings(model, name, module))
    full_modules: Parts = {name: TrainedModule(module, name) for name, module in saved.items()}
    rows = _build_rows(model, config.trainable_token_indices)
    parameters = _build_parameters(model, config, seed)
    _check_no_overlap(layers, full_modules, rows, parameters)
    named = {**layers, **full_modules, **rows, **parameters}
    parts = {**_build_tied_embeddings(model, layers, named), **named}
    return {**parts, **_build_biases(model, config, parts)}


def place_parts(model: nn.Module, parts: Parts) -> None:
    """Freeze `model` and insert the parts."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    disable_cpu_repacking(model)
    guard_methods(model)
    for name, part in parts.items():
        replace_module(model, name, part)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield each low-rank update with the path of the module it wraps, in model order."""
    for name, part in adapter_parts(model):
        if isinstance(part, LAYERS):
            yield name, cast(LoraLayer, part)


def updated_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parts that update a module named by target_modules, by its path."""
    kinds = (*LAYERS, LoraAttention)
    return {name: part for name, part in adapter_parts(model) if isinstance(part, kinds)}


def updated_parameters(model: nn.Module) -> dict[str, LoraExperts | LoraParameters]:
    """Return the parts that update parameters named by target_parameters, by the module's path."""
    kinds = (LoraExperts, LoraParameters)
    return {name: part for name, part in adapter_parts(model) if isinstance(part, kinds)}


def trained_weights(model: nn.Module) -> int:
    """Return the number of trainable weights."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _build_layer(module: nn.Module, target: Target, config: LoraConfig, seed: int) -> nn.Module:
    layer: LoraLinear | LoraEmbedding | LoraConv | LoraAttention
    refuse_computed(module, target.name, tensor="bias", setting="target_modules")
    if isinstance(module, nn.Embedding):
        layer = LoraEmbedding(module, target, config)
    elif isinstance(module, nn.MultiheadAttention):
        layer = LoraAttention(module, target, config)
    elif isinstance(module, KINDS):
        layer = LoraConv(module, target, config)
    else:
        layer = LoraLinear(module, target, config)
        check_computes_linear(module, layer.frozen, target.name)
    layer.reset(target.name, config, seed)
    return layer


def _build_tied_embeddings(model: nn.Module, layers: Parts, named: Parts) -> Parts:
    """Build the parts of embeddings that compute with a weight which an adapted one only holds.

    An embedding that the config names has its own part.
    """
    parts: Parts = {}
    for name, layer in layers.items():
        if isinstance(layer, LoraEmbedding):
            computing = _computing_embeddings(model, name, layer.base)
            for path, embedding in computing.items():
                if path not in named:
                    parts[path] = TiedEmbedding(embedding, path, layer)
    return parts


def _computing_embeddings(
    model: nn.Module, name: str, module: nn.Module
) -> dict[str, nn.Embedding]:
    return computing_embeddings(model, name, users_of_weight(model, module))


def _build_parameters(model: nn.Module, config: LoraConfig, seed: int) -> Parts:
    """Build the updates of named parameters; as in PEFT, A is initialized at random."""
    if config.target_parameters and (config.use_dora or config.lora_bias):
        raise TargetError("target_parameters take neither use_dora nor lora_bias; disable these")
    parts: Parts = {}
    modules = plain_modules(model)
    for path, names in parameter_targets(modules, config.target_parameters).items():
        sizes = {}
        for name in names:
            full_name = f"{path}.{name}"
            sizes[name] = (config.rank_of(full_name), config.scale_of(full_name))
        kind = LoraExperts if supports(modules[path]) else LoraParameters
        part = kind(modules[path], sizes)
        part.reset(path, config.init_lora_weights, seed)
        parts[path] = part
    return parts


def _build_rows(model: nn.Module, rows_by_name: Mapping[str, tuple[int, ...]]) -> Parts:
    """Build the trained rows of embeddings, and the modules that share the weight of one."""
    parts: Parts = {}
    for name, rows in rows_by_name.items():
        for path, module in named_modules(model, [name], "trainable_token_indices").items():
            trained = TrainedRows(module, path, rows)
            tied = {
                user_path: _tied_part(user, user_path, trained)
                for user_path, user in users_of_weight(model, module).items()
            }
            _check_one_owner(path, [*parts], tied)
            parts |= {path: trained, **tied}
    return parts


def _tied_part(module: nn.Module, path: str, rows: TrainedRows) -> nn.Module:
    """Return the part for another module that has the weight of the embedding with trained rows."""
    if isinstance(module, nn.Embedding):
        return TiedEmbedding(module, path, rows)
    if base_weight(module) is not None:
        return TiedHead(module, rows)
    raise TargetError(
        f"trainable_token_indices trains rows of a weight that {path}, a {type(module).__name__}, "
        "has too, and only embeddings and linear layers can use trained rows; "
        "untie that weight first"
    )


def _check_one_owner(path: str, others: list[str], tied: Parts) -> None:
    """Raise if two names select embeddings that share a weight: it has one set of trained rows."""
    for other in others:
        if other in tied:
            raise TargetError(
                f"trainable_token_indices names {other} and {path}, which share one weight; "
                "name only one of them, such as the embedding that get_input_embeddings returns"
            )


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
        refuse_computed(modules[name], name, tensor="weight", setting="bias='all'")
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
                "which is trained or adapted as one module; name one of them"
            )
