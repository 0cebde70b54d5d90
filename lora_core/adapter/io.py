"""Save an adapter in PEFT's format, to the byte, and load one that is held against its model first.

What PEFT does not know stands in a sidecar beside it: on which base the adapter was trained, and digests of everything.
"""

import math
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_core.adapter.adapter_files import (
    CONFIG,
    IDENTITY,
    PREFIX,
    WEIGHTS,
    check_digests,
    check_fingerprint,
    check_values,
    file_digests,
    pattern_for,
    read_identity,
    read_tensors,
)
from lora_core.adapter.peft_config import peft_config, read_config
from lora_core.base.identity import fingerprint
from lora_core.config import LoraConfig
from lora_core.errors import AdapterError
from lora_core.files import folder_written_aside, write_json
from lora_core.init.spectral import is_spectral
from lora_core.injection import Parts, build_parts, lora_layers, place_parts
from lora_core.layers.expert_layout import supports
from lora_core.layers.experts import LoraExperts, expert_targets
from lora_core.layers.linear import LoraLinear
from lora_core.modules import adapter_parts, plain_modules, unwrapped
from lora_core.planning import matched_names, plan_targets
from lora_core.targets import Target

CLASSIFIERS = ("classifier", "score")
"""Names under which PEFT looks for the head of any classifier."""
ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the key of an update of one expert by itself: transformers before 5 held no stacks."""
MEANT_FOR_STACKS = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"})
"""Names of linear layers that PEFT 0.21, on a model with stacks of experts, takes to mean these stacks or their router, as in
adapters from before; only a qwen2_moe is spared. Then the dense layers of these names cannot be named to it at all."""


@dataclass(frozen=True)
class Identity:
    """What an adapter was trained on."""

    base: str = ""
    """Where the base came from: a hub id, a folder, or an embedded model's name."""
    revision: str = ""
    base_digests: dict[str, str] = field(default_factory=dict)
    """Kind of storage (dense, nf4, …) → fingerprint of the base stored that way."""
    lineage: dict[str, str] = field(default_factory=dict)
    """Digests and names of whatever else went in: data, recipe, tokenizer, commit."""


def save_adapter(model: nn.Module, folder: Path, config: LoraConfig, identity: Identity) -> str:
    """Write the adapter that `model` carries; return the SHA-256 of its weights file.

    The folder appears complete or not at all, and equal adapters give equal bytes.

    Args:
        model: carries the adapter; on several processes, call it on one, with whole tensors.
        folder: created or replaced.
        config: what was injected.
        identity: written to the sidecar; the model's own digest is added.

    Raises:
        AdapterError: a tensor is misshapen or not finite, or the config is another; nothing is written.
    """
    tensors = adapter_tensors(model)
    _check_injected(model, config)
    names = [name for name, _ in lora_layers(model)]
    _warn_of_peft(model, names)
    config = _in_any_order(_as_written(config), [*names, *_stacks(model)])
    check_values(tensors, "the model")
    kind, digest = fingerprint(model)
    described = {"base": identity.base, "revision": identity.revision, "lineage": identity.lineage}
    with folder_written_aside(folder) as aside:
        save_file(tensors, str(aside / WEIGHTS), metadata={"format": "pt"})
        base = {"base_model_name_or_path": identity.base, "revision": identity.revision or None}
        write_json(aside / CONFIG, {**peft_config(model, config, names), **base})
        digests = file_digests(aside, tensors)
        write_json(
            aside / IDENTITY,
            {**described, "base_digests": {**identity.base_digests, kind: digest}, **digests},
        )
    return str(digests["adapter_sha256"])


def load_adapter(
    model: nn.Module, folder: Path, *, check_base: bool = True, check_trained: bool = True
) -> list[Target]:
    """Put the adapter in `folder` into `model`; return the plan of its updates.

    Everything is checked before the model is touched. Its weights can be trained on.

    Args:
        model: the base the adapter was trained on; changed in place, wholly or not at all.
        folder: PEFT format, with or without our sidecar (PEFT's own adapters have none).
        check_base: refuse a base whose fingerprint differs from the sidecar's.
        check_trained: refuse an adapter that has updates of zero beside others.

    Raises:
        AdapterError: files missing or malformed, tensors missing, extra, misshapen or not finite, an unknown feature.
        BaseMismatchError: the adapter was trained on another base.
        TargetError: the model has no such modules, or carries an adapter.
    """
    config, parts = open_adapter(model, folder, check_base=check_base, check_trained=check_trained)
    targets = plan_targets(model, config)
    place_parts(model, parts)
    return targets


def open_adapter(
    model: nn.Module, folder: Path, *, check_base: bool = True, check_trained: bool = True
) -> tuple[LoraConfig, Parts]:
    """Read an adapter, hold it against `model`, and return its parts, filled; see `load_adapter`. `model` is not changed."""
    config, tensors = _without_peft_guesses(read_config(folder), model), read_tensors(folder)
    _refuse_single_experts(tensors, model, folder)
    parts = build_parts(model, config, plan_targets(model, config), seed=0)
    expected = tensors_of(parts)
    tensors = _without_base_copies(tensors, parts, folder)
    _check_keys(tensors, expected, folder)
    check_values(tensors, str(folder))
    if check_trained:
        _check_trained(tensors, folder)
    identity = read_identity(folder)
    if identity is not None:
        check_digests(folder, identity)
        if check_base:
            check_fingerprint(fingerprint(model), folder, identity)
    _fill(expected, tensors)
    return config, parts


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's keys, on the CPU in float32."""
    found: dict[str, Tensor] = dict(tensors_of(dict(adapter_parts(model))))
    for name, layer in lora_layers(model):
        if isinstance(
            layer, LoraLinear
        ):  # with a start from the weight, what is written is the trained pair less the start
            a, b = layer.factors()
            found |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    return {
        key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in found.items()
    }


def tensors_of(parts: Parts) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter's parts under PEFT's keys."""
    return {
        f"{PREFIX}{name}.{key}": parameter
        for name, part in parts.items()
        for key, parameter in _own(part).items()
    }


def _own(part: nn.Module) -> dict[str, nn.Parameter]:
    tensors: dict[str, nn.Parameter] = part.adapter_tensors()  # type: ignore[operator]
    return tensors


@torch.no_grad()
def _fill(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])


def _as_written(config: LoraConfig) -> LoraConfig:
    """Return the config of the plain adapter that is written: a start from the weight doubles the rank and keeps the scale."""
    if not is_spectral(config.init_lora_weights):
        return config
    factor = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
        init_lora_weights="kaiming",
    )


def _in_any_order(config: LoraConfig, names: list[str]) -> LoraConfig:
    """Return the config with patterns that decide the same when they are sorted, as the keys of a file are.

    The first pattern that matches decides: where another would come first, each target is named by its whole path.
    """
    ranks, alphas = (
        dict(sorted(config.rank_pattern.items())),
        dict(sorted(config.alpha_pattern.items())),
    )
    ordered = replace(config, rank_pattern=ranks, alpha_pattern=alphas)
    if all(
        (ordered.rank_of(name), ordered.alpha_of(name))
        == (config.rank_of(name), config.alpha_of(name))
        for name in names
    ):
        return config
    return replace(
        config,
        rank_pattern={
            pattern_for(name, names): config.rank_of(name)
            for name in names
            if config.rank_of(name) != config.r
        },
        alpha_pattern={
            pattern_for(name, names): config.alpha_of(name)
            for name in names
            if config.alpha_of(name) != config.lora_alpha
        },
    )


def _stacks(model: nn.Module) -> list[str]:
    """Return the paths of the adapted stacks of experts."""
    return [
        f"{name}.{stack}"
        for name, part in adapter_parts(model)
        if isinstance(part, LoraExperts)
        for stack in part.scales
    ]


def _warn_of_peft(model: nn.Module, names: list[str]) -> None:
    """Say so where PEFT would put an adapter on other weights than it was trained on."""
    unnamed = [name for name in names if name.rpartition(".")[2] in MEANT_FOR_STACKS]
    if (
        unnamed
        and _has_stacks(model)
        and getattr(getattr(unwrapped(model), "config", None), "model_type", None) != "qwen2_moe"
    ):
        warnings.warn(
            f"PEFT takes {unnamed[0]} to mean the model's stacks of experts and would load this adapter wrongly, with a warning of "
            f"missing keys; load it with lora_core, merge it for others, or leave {', '.join(sorted(MEANT_FOR_STACKS))} out of the targets",
            stacklevel=3,
        )


def _refuse_single_experts(tensors: dict[str, Tensor], model: nn.Module, folder: Path) -> None:
    single = min((key for key in tensors if ONE_EXPERT.search(key)), default=None)
    if single is not None and _has_stacks(model):
        raise AdapterError(
            f"{folder} holds an update of each expert by itself, such as {single}, and this model holds its experts in stacks; load the "
            "adapter on this model with PEFT, which puts such updates together, save it there, and load what it saved"
        )


def _has_stacks(model: nn.Module) -> bool:
    return any(supports(module) for module in plain_modules(model).values())


def _without_peft_guesses(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Leave out of modules_to_save what PEFT names for every classifier on the chance that it has such a head."""
    plain = plain_modules(model)
    there = [
        name
        for name in CLASSIFIERS
        if any(path == name or path.endswith(f".{name}") for path in plain)
    ]
    guessed = set(CLASSIFIERS) <= set(config.modules_to_save) and there
    return (
        replace(
            config,
            modules_to_save=tuple(
                n for n in config.modules_to_save if n not in CLASSIFIERS or n in there
            ),
        )
        if guessed
        else config
    )


def _without_base_copies(
    tensors: dict[str, Tensor], parts: Parts, folder: Path
) -> dict[str, Tensor]:
    """Leave out the base's own weight, which PEFT saves beside an adapted embedding; another weight is refused."""
    kept = dict(tensors)
    for name, part in parts.items():
        copy, own = (
            kept.pop(f"{PREFIX}{name}.base_layer.weight", None),
            getattr(part.base, "weight", None),
        )
        if copy is not None and not (
            isinstance(own, Tensor) and torch.equal(copy.to(own.dtype), own.cpu())
        ):
            raise AdapterError(
                f"{folder} holds a base weight of {name} that is not this model's; load it on the base it was trained on"
            )
    return kept


def _check_injected(model: nn.Module, config: LoraConfig) -> None:
    """Refuse a config that is not what the model carries: it would be written beside weights it does not describe."""
    layers, experts = (
        dict(lora_layers(model)),
        {name for name, part in adapter_parts(model) if isinstance(part, LoraExperts)},
    )
    if not (layers or experts):
        raise AdapterError("the model carries no adapter; inject one before saving")
    matched = set(matched_names(model, config)) if config.target_modules else set()
    if (
        matched != set(layers)
        or set(expert_targets(unwrapped(model), config.target_parameters)) != experts
    ):
        raise AdapterError(
            f"the config's target_modules={config.target_modules!r} are not what is adapted; pass the config injected"
        )
    for name, layer in layers.items():
        rank, found = config.rank_of(name), _rank(layer.adapter_tensors())
        if found != rank:
            raise AdapterError(
                f"{name} has lora_A and lora_B of rank {found} where the config says {rank}; gather them, or pass the config injected"
            )
        if layer.scale != config.scale_of(name):
            raise AdapterError(
                f"{name} has the scale {layer.scale} and the config {config.scale_of(name)}; pass the config that was injected"
            )


def _rank(tensors: dict[str, nn.Parameter]) -> Any:
    """Return the rank that both factors have, or the shapes that disagree or are not whole."""
    a, b = list(tensors.values())[:2]
    whole = a.dim() >= 2 and b.dim() >= 2 and a.shape[0] == b.shape[1]
    return a.shape[0] if whole else (tuple(a.shape), tuple(b.shape))


def _check_keys(
    tensors: dict[str, Tensor], expected: dict[str, nn.Parameter], folder: Path
) -> None:
    """Refuse a difference between the file and the model, and name the first of each kind."""
    missing, extra = (
        sorted(expected.keys() - tensors.keys()),
        sorted(tensors.keys() - expected.keys()),
    )
    misshapen = [
        key for key in expected.keys() & tensors.keys() if tensors[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(keys)} {what}, such as {keys[0]}"
        for what, keys in (("missing", missing), ("extra", extra))
        if keys
    ]
    if misshapen:
        key = min(misshapen)
        belongs = f"{tuple(tensors[key].shape)} where {tuple(expected[key].shape)} belongs"
        problems.append(f"{len(misshapen)} misshapen, such as {key} of {belongs}")
    if problems:
        raise AdapterError(
            f"the tensors of {folder} do not fit this model: {'; '.join(problems)}; load it on the base it was trained on"
        )


def _check_trained(tensors: dict[str, Tensor], folder: Path) -> None:
    """Refuse an adapter of which a part was trained and a part was not, as a save of scattered tensors leaves it."""
    zero = [
        key
        for key, tensor in tensors.items()
        if key.endswith(".lora_B.weight") and not tensor.any()
    ]
    trained = sum(key.endswith(".lora_B.weight") for key in tensors) - len(zero)
    if zero and trained:
        raise AdapterError(
            f"{folder} has {len(zero)} updates of zero, such as {min(zero)}, beside {trained} that were trained; save it again from "
            "whole tensors, or pass check_trained=False if those layers were never in use"
        )
