"""adapter_config.json: a LoraConfig in PEFT's words, and back.

What is read is honoured or refused: a feature that would be ignored here is an error. What is written names the adapted
modules so that PEFT adapts the same ones.
"""

import re
from pathlib import Path
from typing import Any

from torch import nn

from lora_core.adapter.adapter_files import CONFIG, read_json
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
"""Fields that both sides call and mean the same."""
NAMES = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
)
"""Fields that hold a list in JSON."""
HONOURED = frozenset(
    {*PLAIN, *NAMES, "trainable_token_indices", "init_lora_weights", "fan_in_fan_out"}
    | {
        "peft_type",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
    }
)
NO_EFFECT: tuple[Any, ...] = (
    None,
    False,
    "none",
    [],
    {},
    "lora",
)  # what PEFT writes for a feature that is off
INITS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base weight as it is
WITHOUT_MEANING_HERE = frozenset(
    {"auto_mapping", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"}
)
"""What says how PEFT ran, or (eva_config) how it found a start that the file no longer needs."""
EMBEDDING = "embed_tokens"
"""What PEFT takes a bare list of token rows to mean."""


def read_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json.

    Raises:
        AdapterError: the file is missing or malformed, or asks for a feature that would be ignored here.
    """
    values = read_json(folder / CONFIG)
    if values.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder / CONFIG} has peft_type {values.get('peft_type')!r}; only LORA adapters can be loaded"
        )
    for key, value in values.items():
        if key not in HONOURED | WITHOUT_MEANING_HERE and not _is_off(value):
            raise AdapterError(
                f"{folder / CONFIG} sets {key}={value!r}, a feature that would be ignored here, so it is refused"
            )
    if values.get("init_lora_weights", True) not in INITS:
        raise AdapterError(
            f"{folder / CONFIG} sets init_lora_weights={values['init_lora_weights']!r}, which changes the base; save it as plain LoRA"
        )
    try:
        return LoraConfig(**_fields(values))
    except (KeyError, ConfigError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{folder / CONFIG} is no usable LoRA configuration: {error}; save the adapter again"
        ) from error


def peft_config(model: nn.Module, config: LoraConfig, names: list[str]) -> dict[str, Any]:
    """Spell `config` in PEFT's words.

    Args:
        model: carries the adapter.
        config: what was injected.
        names: the paths of the modules with a low-rank update.
    """
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model, config),
        **{name: _plain(getattr(config, name)) for name in PLAIN},
        "target_modules": _targets(model, config, names),
        "target_parameters": sorted(config.target_parameters) or None,
        "modules_to_save": sorted(config.modules_to_save) or None,
        "trainable_token_indices": {
            name: list(rows) for name, rows in config.trainable_token_indices.items()
        }
        or None,
        "fan_in_fan_out": any(type(module).__name__ == "Conv1D" for module in model.modules()),
        "init_lora_weights": _init_word(config),
        "inference_mode": True,
    }


def _init_word(config: LoraConfig) -> str | bool:
    """Return a start that PEFT takes to a file of weights: others ask for data or change the base, or it knows no such word.

    Beside lora_bias it takes none but its own.
    """
    return "gaussian" if config.init_lora_weights == "gaussian" and not config.lora_bias else True


def _task_type(model: nn.Module, config: LoraConfig) -> str | None:
    """Return what PEFT wraps the model as; None is its plain wrapper, which fits every model.

    A classifier is named only where its head is saved, since PEFT then looks for the head in the file.
    """
    model = unwrapped(model)
    if hasattr(model, "prepare_inputs_for_generation"):
        return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
    heads = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    return next(
        (
            kind
            for name, kind in heads.items()
            if type(model).__name__.endswith(name) and config.modules_to_save
        ),
        None,
    )


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a LoraConfig that a file's values mean."""
    fields = {name: values[name] for name in PLAIN if values.get(name) is not None}
    fields |= {
        name: _names(values[name]) for name in NAMES if values.get(name) not in (None, [], "")
    }
    for name in ("r", "lora_alpha"):
        fields[name] = values[name]
    fields["target_modules"] = _names(values.get("target_modules") or ())
    tokens = values.get("trainable_token_indices") or {}
    by_name = tokens if isinstance(tokens, dict) else {EMBEDDING: tokens}
    fields["trainable_token_indices"] = {name: tuple(rows) for name, rows in by_name.items()}
    return {
        **fields,
        "init_lora_weights": "gaussian"
        if values.get("init_lora_weights") == "gaussian"
        else "kaiming",
    }


def _names(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int) else value


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value


def _targets(model: nn.Module, config: LoraConfig, names: list[str]) -> str | list[str]:
    """Name the adapted modules: as the config does where PEFT then finds the same, else spelt out."""
    targets: Names = config.target_modules
    if not names:
        return []
    plain = plain_modules(model)
    if isinstance(targets, tuple):
        by_end = {
            name
            for name in plain
            if any(name == one or name.endswith(f".{one}") for one in targets)
        }
        return sorted(targets) if by_end == set(names) else sorted(_spelt_out(plain, names))
    if targets != ALL_LINEAR and {name for name in plain if re.fullmatch(targets, name)} == set(
        names
    ):
        return targets
    return sorted(_spelt_out(plain, names))


def _spelt_out(plain: dict[str, nn.Module], names: list[str]) -> set[str]:
    """Return the last parts of the names, or, where another module shares one, the whole names."""
    endings = {name.rpartition(".")[2] for name in names}
    matched = {name for name in plain if name.rpartition(".")[2] in endings}
    return endings if matched == set(names) else set(names)


def _is_off(value: Any) -> bool:
    return any(type(value) is type(off) and value == off for off in NO_EFFECT)
