"""Save an adapter in PEFT's format, to the byte, and load one after checking it against its model.

A sidecar records what PEFT's format does not: the base the adapter was trained on, and the digest
of everything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapter.adapter_files import (
    check_digests,
    check_fingerprint,
    check_values,
    pattern_for,
    read_tensors,
)
from lora_core.adapter.checks import check_injected, check_keys, warn_of_untrained
from lora_core.adapter.checks import check_trained as check_all_trained
from lora_core.adapter.json_files import PREFIX, TRANSPOSED, ZERO_UPDATES, read_identity
from lora_core.adapter.peft_compat import (
    refuse_other_vocabulary,
    refuse_rows_of_one_user,
    refuse_single_experts,
    tied_copies,
    warn_of_misread_names,
    warn_of_shared_embedding,
    without_base_copies,
    without_guessed_heads,
    without_tied_copies,
)
from lora_core.adapter.peft_config import peft_config, read_config
from lora_core.adapter.peft_rules import by_peft_rules
from lora_core.adapter.renaming import Rename, rename_modules
from lora_core.adapter.rewriting import write_files
from lora_core.base.identity import ModelSource, recorded_digests
from lora_core.base.quant import transposed_modules
from lora_core.config import LoraConfig
from lora_core.errors import AdapterError
from lora_core.init.spectral import is_spectral
from lora_core.injection import (
    Parts,
    build_parts,
    lora_layers,
    place_parts,
    updated_modules,
    updated_parameters,
)
from lora_core.layers.linear import LoraLinear
from lora_core.layers.trained import TrainedModule, TrainedRows
from lora_core.modules import adapter_parts
from lora_core.planning import plan_targets
from lora_core.targets import Target


@dataclass(frozen=True)
class Identity:
    """What an adapter was trained on."""

    base: str = ""
    """Where the base came from: a hub id, a folder, or an embedded model's name."""
    revision: str = ""
    base_digests: dict[str, str] = field(default_factory=dict)
    """Kind of storage (dense, nf4, …) → fingerprint of the base stored that way."""
    lineage: dict[str, str] = field(default_factory=dict)
    """Digests and names of all other inputs: data, recipe, tokenizer, commit."""


def save_adapter(model: nn.Module, folder: Path, config: LoraConfig, identity: Identity) -> str:
    """Write the adapter that `model` carries; return the SHA-256 of its weights file.

    The folder appears complete or not at all, and equal adapters give equal bytes.

    Args:
        model: carries the adapter; with several processes, call this on one, with gathered tensors.
        folder: created or replaced.
        config: the config that was injected.
        identity: written to the sidecar; the model's own digest is added.

    Raises:
        AdapterError: a tensor has a wrong shape or is not finite, or the config is not the one
            that was injected; nothing is written.

    Warns:
        UserWarning: some updates are zero and others are not: the model did not use these layers.
    """
    tensors = adapter_tensors(model)
    check_injected(model, config)
    names = list(updated_modules(model))
    warn_of_misread_names(model, names)
    warn_of_shared_embedding(model)
    config = _independent_of_order(_as_written(config), [*names, *_stacks(model)])
    check_values(tensors, "the model")
    zero_updates = warn_of_untrained(tensors)
    base = {"base_model_name_or_path": identity.base, "revision": identity.revision or None}
    values = {**peft_config(model, config, names), **base}
    sidecar = _sidecar(model, identity)
    if zero_updates:
        sidecar[ZERO_UPDATES] = zero_updates
    return write_files(folder, tensors, values=values, identity=sidecar)


def load_adapter(
    model: nn.Module,
    folder: Path,
    *,
    check_base: bool = True,
    check_trained: bool = True,
    renames: Sequence[Rename] = (),
) -> list[Target]:
    """Put the adapter in `folder` into `model`; return the plan of its updates.

    Everything is checked before the model changes. The loaded weights can be trained further.

    Args:
        model: the base the adapter was trained on; changed in place, completely or not at all.
        folder: PEFT format, with or without our sidecar (PEFT's own adapters have none).
        check_base: refuse a base whose fingerprint differs from the sidecar's.
        check_trained: refuse an adapter in which some updates are zero and others are not, unless
            they were when this library saved it.
        renames: how names of weights changed between the version of the model's library that wrote
            the adapter and this one, in both directions; see `lora_core.adapter.renaming`.

    Raises:
        AdapterError: files missing or malformed, tensors missing, extra, of a wrong shape or not
            finite, or a feature that is not supported.
        BaseMismatchError: the adapter was trained on another base.
        TargetError: the model has no such modules, or already carries an adapter.
    """
    config, parts = open_adapter(
        model,
        folder,
        check_base=check_base,
        check_trained=check_trained,
        renames=renames,
    )
    targets = plan_targets(model, config)
    place_parts(model, parts)
    return targets


def open_adapter(
    model: nn.Module,
    folder: Path,
    *,
    check_base: bool = True,
    check_trained: bool = True,
    renames: Sequence[Rename] = (),
) -> tuple[LoraConfig, Parts]:
    """Read an adapter, check it against `model`, and return its config and filled parts.

    `model` is not changed; for arguments and exceptions, see `load_adapter`.
    """
    config = without_guessed_heads(read_config(folder), model)
    file = rename_modules(read_tensors(folder), renames, model, folder)
    tensors = file.tensors
    identity = read_identity(folder)
    refuse_single_experts(tensors, model, folder)
    refuse_other_vocabulary(tensors, model, folder)
    if identity is None or file.former:
        config = by_peft_rules(config, file, model, folder)
    parts = build_parts(model, config, plan_targets(model, config), seed=0)
    expected = tensors_of(parts)
    tensors = without_base_copies(tensors, parts, folder)
    tensors = without_tied_copies(tensors, parts, folder)
    check_keys(tensors, expected, folder)
    check_values(tensors, str(folder))
    if check_trained:
        reported = (identity or {}).get(ZERO_UPDATES, [])
        check_all_trained(tensors, folder, [file.keys.get(key, key) for key in reported])
    if identity is None:
        refuse_rows_of_one_user(model, parts, folder)
    else:
        check_digests(folder, identity)
        if check_base:
            source = ModelSource(model, _supplied(parts))
            check_fingerprint(source, adapter=folder, identity=identity)
    _fill(expected, tensors)
    return config, parts


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's keys, on the CPU in float32."""
    parts = dict(adapter_parts(model))
    found: dict[str, Tensor] = dict(tensors_of(parts))
    for name, layer in lora_layers(model):
        if isinstance(layer, LoraLinear):
            # A spectral initialization is subtracted again in what is written.
            a, b = layer.factors()
            found[f"{PREFIX}{name}.lora_A.weight"] = a
            found[f"{PREFIX}{name}.lora_B.weight"] = b
    for key, tensor in found.items():
        if tensor.is_meta:
            raise AdapterError(
                f"{key} is on the meta device, so its values cannot be saved: the adapter is "
                "offloaded; offload the base before injection instead, or do not offload"
            )
    written = {
        key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in found.items()
    }
    copies = {other: written[key].clone() for other, key in tied_copies(parts).items()}
    return {**written, **copies}


def tensors_of(parts: Parts) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter's parts under PEFT's keys."""
    found: dict[str, nn.Parameter] = {}
    for name, part in parts.items():
        tensors: dict[str, nn.Parameter] = part.adapter_tensors()  # type: ignore[operator]
        for key, parameter in tensors.items():
            found[f"{PREFIX}{name}.{key}"] = parameter
    return found


def _supplied(parts: Parts) -> dict[str, Tensor | None]:
    """Return the modules whose weights the adapter supplies, or which rows of them."""
    supplied: dict[str, Tensor | None] = {}
    for path, part in parts.items():
        if isinstance(part, TrainedModule):
            supplied[path] = None
        elif isinstance(part, TrainedRows):
            supplied[path] = part.rows
    return supplied


def _sidecar(model: nn.Module, identity: Identity) -> dict[str, Any]:
    """Return what the sidecar records of the base and of the inputs."""
    source = ModelSource(model, _supplied(dict(adapter_parts(model))))
    return {
        "base": identity.base,
        "revision": identity.revision,
        "lineage": identity.lineage,
        "base_digests": {**identity.base_digests, **recorded_digests(source)},
        TRANSPOSED: transposed_modules(model),
    }


@torch.no_grad()
def _fill(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])


def _as_written(config: LoraConfig) -> LoraConfig:
    """Return the config of the plain adapter that is written.

    A spectral initialization doubles the rank and keeps the scale.
    """
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


def _independent_of_order(config: LoraConfig, names: list[str]) -> LoraConfig:
    """Return the config with patterns that decide the same when a file sorts its keys.

    The first matching pattern decides: if sorting changes it, each target gets its own pattern.
    """
    ordered = replace(
        config,
        rank_pattern=dict(sorted(config.rank_pattern.items())),
        alpha_pattern=dict(sorted(config.alpha_pattern.items())),
    )
    if _decide_the_same(config, ordered, names):
        return config
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for name in names:
        pattern = pattern_for(name, names)
        rank = config.rank_of(name)
        if rank != config.r:
            rank_pattern[pattern] = rank
        alpha = config.alpha_of(name)
        if alpha != config.lora_alpha:
            alpha_pattern[pattern] = alpha
    return replace(config, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)


def _decide_the_same(one: LoraConfig, other: LoraConfig, names: list[str]) -> bool:
    """Return whether two configs give each target the same rank and alpha."""
    for name in names:
        if one.rank_of(name) != other.rank_of(name):
            return False
        if one.alpha_of(name) != other.alpha_of(name):
            return False
    return True


def _stacks(model: nn.Module) -> list[str]:
    """Return the paths of the adapted parameters, such as stacks of experts."""
    paths: list[str] = []
    for name, part in updated_parameters(model).items():
        paths += [f"{name}.{parameter}" for parameter in part.scales]
    return paths
