"""Adapters on disk: PEFT's format to the byte, a sidecar for what PEFT does not know, and a load that trusts nothing.

    adapter_model.safetensors   base_model.model.<module path>.lora_A.weight (r, in), .lora_B.weight (out, r)
    adapter_config.json         PEFT's fields, sorted
    adapter_identity.json       ours: the base's digests, the file's digest, lineage

Only safetensors and JSON are read; a pickle is refused.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.config import ALL_LINEAR, LoraConfig
from lora_core.errors import AdapterError, BaseMismatchError, ConfigError
from lora_core.files import folder_written_aside, sha256_of_file, write_json
from lora_core.identity import fingerprint
from lora_core.injection import Target, inject, lora_layers, matched_names, plain_name, plan_targets, unwrapped

WEIGHTS, CONFIG, IDENTITY = "adapter_model.safetensors", "adapter_config.json", "adapter_identity.json"
PREFIX = "base_model.model."
HONOURED = frozenset(
    {"peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "init_lora_weights"}
    | {"base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
)
NO_EFFECT: tuple[Any, ...] = (None, False, "none", [], {}, "lora")  # what PEFT writes for a feature that is off
INITS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base weight as it is
WITHOUT_MEANING_HERE = frozenset({"auto_mapping", "megatron_core", "qalora_group_size", "runtime_config"})


@dataclass(frozen=True)
class Identity:
    """What an adapter was trained on."""

    base: str = ""
    """Where the base came from: a hub id, a folder, or an embedded model's name."""
    revision: str = ""
    base_digests: dict[str, str] = field(default_factory=dict)
    """Kind of storage (dense, nf4) → fingerprint of the base stored that way."""
    lineage: dict[str, str] = field(default_factory=dict)
    """Digests and names of whatever else went in: data, recipe, tokenizer, commit."""


def save_adapter(model: nn.Module, folder: Path, config: LoraConfig, identity: Identity) -> str:
    """Write the adapter that `model` carries; return the SHA-256 of its weights file.

    The folder appears complete or not at all, and equal adapters give equal bytes.

    Args:
        model: holds LoraLinear layers; on several processes, call it on one, with whole tensors.
        folder: created or replaced.
        config: what was injected.
        identity: written to the sidecar; the model's own digest is added.

    Raises:
        AdapterError: a tensor is misshapen or not finite; nothing is written.
    """
    tensors = adapter_tensors(model)
    _check_injected(model, config, tensors)
    _check_values(tensors, "the model")
    kind, digest = fingerprint(model)
    with folder_written_aside(folder) as aside:
        save_file(tensors, str(aside / WEIGHTS), metadata={"format": "pt"})
        sha256 = sha256_of_file(aside / WEIGHTS)
        write_json(aside / CONFIG, _peft_config(model, config, identity))
        sidecar = {
            "base": identity.base,
            "revision": identity.revision,
            "base_digests": {**identity.base_digests, kind: digest},
            "lineage": identity.lineage,
            "adapter_sha256": sha256,
            "tensor_sha256": {key: _sha256(tensor) for key, tensor in tensors.items()},
        }
        write_json(aside / IDENTITY, sidecar)
    return sha256


def load_adapter(model: nn.Module, folder: Path, *, check_base: bool = True) -> list[Target]:
    """Inject the adapter in `folder` into `model`, ready for inference; return its targets.

    Everything is checked before the model is touched.

    Args:
        model: the base the adapter was trained on, dense or 4-bit; changed in place.
        folder: PEFT format, with or without our sidecar (PEFT's own adapters have none).
        check_base: refuse a base whose fingerprint differs from the sidecar's.

    Raises:
        AdapterError: files missing or malformed, tensors missing, extra, misshapen or not finite, an unknown feature.
        BaseMismatchError: the adapter was trained on another base.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    expected = _expected_shapes(plan_targets(model, config))
    _check_keys(tensors, expected, folder)
    _check_values(tensors, str(folder))
    identity = read_identity(folder)
    if identity is not None:
        _check_digest(folder, identity)
        if check_base:
            _check_base(model, folder, identity)
    targets = inject(model, config, seed=0)
    fill_adapter(model, tensors)
    return targets


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's keys, on the CPU in float32."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model):
        for letter, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
            tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = parameter.detach().to("cpu", torch.float32).contiguous()
    return tensors


@torch.no_grad()
def fill_adapter(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy `tensors`, under PEFT's keys and already checked, into the adapter that `model` carries."""
    for name, layer in lora_layers(model):
        layer.lora_A.copy_(tensors[f"{PREFIX}{name}.lora_A.weight"])
        layer.lora_B.copy_(tensors[f"{PREFIX}{name}.lora_B.weight"])


def read_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json.

    Raises:
        AdapterError: the file is missing or malformed, or asks for a feature that would be ignored here.
    """
    values = _read_json(folder / CONFIG)
    if values.get("peft_type") != "LORA":
        raise AdapterError(f"{folder / CONFIG} has peft_type {values.get('peft_type')!r}; only LORA adapters can be loaded")
    for key, value in values.items():
        if key not in HONOURED | WITHOUT_MEANING_HERE and not _is_off(value):
            raise AdapterError(f"{folder / CONFIG} sets {key}={value!r}, a feature that would be ignored here, so it is refused")
    targets: Any = values.get("target_modules")
    if values.get("init_lora_weights", True) not in INITS:
        raise AdapterError(
            f"{folder / CONFIG} sets init_lora_weights={values['init_lora_weights']!r}, which changes the base; save it as plain LoRA"
        )
    try:
        return LoraConfig(
            r=values["r"],
            lora_alpha=values["lora_alpha"],
            target_modules=tuple(targets) if isinstance(targets, list) else targets,
            lora_dropout=values.get("lora_dropout", 0.0),
            use_rslora=values.get("use_rslora", False),
            init_lora_weights="gaussian" if values.get("init_lora_weights") == "gaussian" else "kaiming",
        )
    except (KeyError, ConfigError, TypeError) as error:
        raise AdapterError(f"{folder / CONFIG} is no usable LoRA configuration: {error}; save the adapter again") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read adapter_model.safetensors; raises AdapterError when it is missing, damaged or a pickle."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
        hint = "give the folder of a saved adapter"
        if pickles:
            hint = f"{pickles[0]} is a pickle, which can run code: convert it to safetensors"
        raise AdapterError(f"{path} is missing; {hint}")
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is damaged ({error}); fetch or train the adapter again") from error


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Read the sidecar; None where the adapter was not written by this library."""
    return _read_json(folder / IDENTITY) if (folder / IDENTITY).is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing; give the folder of a saved adapter") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}); fetch or train the adapter again") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds {type(value).__name__} where an object belongs; fetch or train the adapter again")
    return value


def _peft_config(model: nn.Module, config: LoraConfig, identity: Identity) -> dict[str, Any]:
    """Spell `config` in PEFT's words; `all-linear` becomes the names it matched, so that PEFT adapts the same."""
    names = [name for name, _ in lora_layers(model)]
    targets = config.target_modules
    if isinstance(targets, str) and not _matches_alone(model, targets, names):
        targets = _spelt_out(model, names)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": identity.base,
        "revision": identity.revision or None,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": "gaussian" if config.init_lora_weights == "gaussian" else True,
        "inference_mode": True,
    }


def _matches_alone(model: nn.Module, pattern: str, names: list[str]) -> bool:
    """Tell whether the regular expression matches the adapted layers and nothing else, as PEFT demands."""
    return pattern != ALL_LINEAR and [n for n, _ in _plain_modules(model) if re.fullmatch(pattern, n)] == names


def _spelt_out(model: nn.Module, names: list[str]) -> tuple[str, ...]:
    """Return the last parts of the names, or, where another module shares one, the whole names."""
    endings = {name.rpartition(".")[2] for name in names}
    matched = [name for name, _ in _plain_modules(model) if name.rpartition(".")[2] in endings]
    return tuple(endings) if matched == names else tuple(names)


def _plain_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules that the model has without its adapter."""
    inside = {id(layer.base) for _, layer in lora_layers(model)}
    return [(plain_name(name), module) for name, module in unwrapped(model).named_modules() if id(module) not in inside]


def _is_off(value: Any) -> bool:
    return any(type(value) is type(off) and value == off for off in NO_EFFECT)


def _check_injected(model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    layers = dict(lora_layers(model))
    if not layers:
        raise AdapterError("the model carries no adapter; inject one before saving")
    for name, layer in layers.items():
        out_features, in_features = layer.frozen.shape
        for letter, shape in (("A", (config.r, in_features)), ("B", (out_features, config.r))):
            found = tuple(tensors[f"{PREFIX}{name}.lora_{letter}.weight"].shape)
            if found != shape:
                raise AdapterError(f"{name}.lora_{letter} is {found} where the config says {shape}; gather it, or pass the config injected")
        if layer.scale != config.scale:
            raise AdapterError(f"{name} has the scale {layer.scale} and the config {config.scale}; pass the config that was injected")
    if set(matched_names(model, config)) != set(layers):
        raise AdapterError(f"the config's target_modules={config.target_modules!r} are not what is adapted; pass the config injected")


def _expected_shapes(targets: list[Target]) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for target in targets:
        shapes[f"{PREFIX}{target.name}.lora_A.weight"] = (target.rank, target.in_features)
        shapes[f"{PREFIX}{target.name}.lora_B.weight"] = (target.out_features, target.rank)
    return shapes


def _check_keys(tensors: dict[str, Tensor], expected: dict[str, tuple[int, int]], folder: Path) -> None:
    """Refuse a difference between the file and the model, and name the first of each kind."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    misshapen = [key for key in expected.keys() & tensors.keys() if tuple(tensors[key].shape) != expected[key]]
    problems = [f"{len(keys)} {what}, such as {keys[0]}" for what, keys in (("missing", missing), ("extra", extra)) if keys]
    if misshapen:
        key = min(misshapen)
        problems.append(f"{len(misshapen)} misshapen, such as {key} of {tuple(tensors[key].shape)} where {expected[key]} belongs")
    if problems:
        raise AdapterError(f"the tensors of {folder} do not fit this model: {'; '.join(problems)}; load it on the base it was trained on")


def _check_values(tensors: dict[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise AdapterError(f"{key} of {where} is {tensor.dtype} of shape {tuple(tensor.shape)}; a matrix of floats belongs there")
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"{key} of {where} holds values that are not finite; train again with a lower learning rate")


def _check_digest(folder: Path, identity: dict[str, Any]) -> None:
    found, recorded = sha256_of_file(folder / WEIGHTS), identity.get("adapter_sha256")
    if found != recorded:
        raise AdapterError(
            f"{folder / WEIGHTS} has sha256 {found[:12]}… but its sidecar says {str(recorded)[:12]}…; fetch or train the adapter again"
        )


def _check_base(model: nn.Module, folder: Path, identity: dict[str, Any]) -> None:
    kind, digest = fingerprint(model)
    recorded = identity.get("base_digests")
    if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
        raise AdapterError(f"{folder / IDENTITY} has base_digests={recorded!r}; fetch or train the adapter again")
    if recorded.get(kind) != digest:
        known = ", ".join(f"{k} {v[:12]}…" for k, v in sorted(recorded.items())) or "none"
        raise BaseMismatchError(
            f"{folder} was trained on {identity.get('base') or 'an unnamed base'} (fingerprints: {known}), "
            f"but this {kind} model has {digest[:12]}…; load that base, or pass check_base=False if you accept wrong answers"
        )


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
