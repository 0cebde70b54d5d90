"""adapter_config.json: a LoraConfig in PEFT's terms, and back.

Every field that is read is applied or refused: a feature that would be ignored is an error. The
written file names the adapted modules so that PEFT adapts the same ones.
"""

import re
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from lora_core.adapter.checks import path_ends_with
from lora_core.adapter.json_files import CONFIG, IDENTITY, read_json
from lora_core.config import ALL_LINEAR, LoraConfig, Names
from lora_core.errors import AdapterError, ConfigError
from lora_core.modules import plain_modules, unwrapped

PLAIN = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "lora_bias",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
)
"""Fields with the same name and meaning in both libraries."""
NAMES = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
)
"""Fields that are a list in JSON."""
DESCRIPTIVE = (
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_version",
)
"""Fields that describe the file."""
SUPPORTED = frozenset(
    {
        *PLAIN,
        *NAMES,
        *DESCRIPTIVE,
        "trainable_token_indices",
        "init_lora_weights",
        "fan_in_fan_out",
        "layers_pattern",
        "ensure_weight_tying",
    }
)
IGNORED = frozenset(
    {
        "auto_mapping",
        "eva_config",
        "loftq_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
)
"""How PEFT ran, or how it would compute an initialization: the file contains the result."""
NO_EFFECT: tuple[Any, ...] = (None, False, "none", [], {}, "lora")
"""What PEFT writes for a feature that is off."""
INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Initializations that leave the base weight unchanged."""
CLASSIFIERS = ("classifier", "score")
"""Names under which PEFT looks for the head of any classifier."""
EMBEDDING = "embed_tokens"
"""The module that PEFT applies a bare list of token rows to."""


def read_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json.

    Raises:
        AdapterError: the file is missing or malformed, or sets a feature that is not supported.
    """
    path = folder / CONFIG
    values = read_json(path)
    _check_supported(path, values)
    is_of_peft = not (folder / IDENTITY).is_file()
    if is_of_peft and values.get("target_modules") is None and not values.get("target_parameters"):
        values["target_modules"] = ALL_LINEAR  # PEFT chose by architecture; the tensors decide
    try:
        return LoraConfig(**_fields(values))
    except (KeyError, ConfigError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{path} is not a valid LoRA configuration: {error}; save the adapter again"
        ) from error


def _check_supported(path: Path, values: dict[str, Any]) -> None:
    """Refuse a config with an unsupported type, feature or initialization."""
    if values.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path} has peft_type {values.get('peft_type')!r}, but only LORA adapters can be "
            "loaded; save the adapter as LoRA"
        )
    for key, value in values.items():
        if key not in SUPPORTED | IGNORED and not _is_off(value):
            raise AdapterError(
                f"{path} sets {key}={value!r}, a feature that would be ignored here; train the "
                "adapter without it"
            )
    if values.get("init_lora_weights", True) not in INITS:
        raise AdapterError(
            f"{path} sets init_lora_weights={values['init_lora_weights']!r}, which changes the "
            "base; save it as plain LoRA"
        )


def peft_config(model: nn.Module, config: LoraConfig, names: list[str]) -> dict[str, Any]:
    """Return `config` in PEFT's terms.

    Args:
        model: carries the adapter.
        config: the config that was injected.
        names: the paths of the modules with a low-rank update.
    """
    token_rows = {name: list(rows) for name, rows in config.trainable_token_indices.items()}
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model, config),
        **{name: _plain(getattr(config, name)) for name in PLAIN},
        "target_modules": _target_modules(model, config, names),
        "target_parameters": sorted(config.target_parameters) or None,
        "modules_to_save": sorted(config.modules_to_save) or None,
        "trainable_token_indices": token_rows or None,
        "fan_in_fan_out": any(type(module).__name__ == "Conv1D" for module in model.modules()),
        "init_lora_weights": _initialization(config),
        "inference_mode": True,
    }


def _initialization(config: LoraConfig) -> str | bool:
    """Return an initialization that PEFT accepts together with saved weights.

    Others need data, change the base or are unknown to PEFT; with lora_bias it accepts only True.
    """
    if config.init_lora_weights == "gaussian" and not config.lora_bias:
        return "gaussian"
    return True


def _task_type(model: nn.Module, config: LoraConfig) -> str | None:
    """Return what PEFT wraps the model as; None is its plain wrapper, which fits every model.

    A classifier is named only if its head is saved, because PEFT then expects the head in the file.
    The other wrappers pass `input_ids`, which a model of sounds or images does not take.
    """
    model = unwrapped(model)
    if "input_ids" not in signature(type(model).forward).parameters:
        return None
    if hasattr(model, "prepare_inputs_for_generation"):
        is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
        return "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"
    if not _is_head_saved(model, config):
        return None
    if type(model).__name__.endswith("SequenceClassification"):
        return "SEQ_CLS"
    if type(model).__name__.endswith("TokenClassification"):
        return "TOKEN_CLS"
    return None


def _is_head_saved(model: nn.Module, config: LoraConfig) -> bool:
    """Return whether every module that PEFT takes for a classifier's head is trained in full."""
    heads = [path for path in plain_modules(model) if path.endswith(CLASSIFIERS)]
    saved = config.modules_to_save
    return bool(heads) and all(path.endswith(saved) for path in heads)


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a LoraConfig that correspond to a file's values."""
    fields: dict[str, Any] = {}
    for name in PLAIN:
        if values.get(name) is not None:
            fields[name] = values[name]
    for name in NAMES:
        if values.get(name) not in (None, [], ""):
            fields[name] = _names(values[name])
    for name in ("r", "lora_alpha"):
        fields[name] = values[name]
    fields["target_modules"] = _names(values.get("target_modules") or ())
    tokens = values.get("trainable_token_indices") or {}
    by_name = tokens if isinstance(tokens, dict) else {EMBEDDING: tokens}
    fields["trainable_token_indices"] = {name: tuple(rows) for name, rows in by_name.items()}
    is_gaussian = values.get("init_lora_weights") == "gaussian"
    fields["init_lora_weights"] = "gaussian" if is_gaussian else "kaiming"
    return fields


def _names(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int) else value


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value


def _target_modules(model: nn.Module, config: LoraConfig, names: list[str]) -> str | list[str]:
    """Name the adapted modules: as the config does if PEFT then matches the same, else in full."""
    targets: Names = config.target_modules
    if not names:
        return []
    plain = plain_modules(model)
    matched = {path for path in plain if _matches_in_peft(path, targets)}
    if matched != set(names):
        return sorted(_explicit_names(plain, names))
    return sorted(targets) if isinstance(targets, tuple) else targets


def _matches_in_peft(path: str, targets: Names) -> bool:
    """Return whether `targets` match a module path in PEFT; all-linear is never written."""
    if isinstance(targets, tuple):
        return path_ends_with(path, targets)
    return targets != ALL_LINEAR and re.fullmatch(targets, path) is not None


def _explicit_names(plain: dict[str, nn.Module], names: list[str]) -> set[str]:
    """Return the last parts of the names, or the full names if another module has the same part."""
    endings = {name.rpartition(".")[2] for name in names}
    matched = {name for name in plain if name.rpartition(".")[2] in endings}
    return endings if matched == set(names) else set(names)


def _is_off(value: Any) -> bool:
    return any(type(value) is type(off) and value == off for off in NO_EFFECT)
