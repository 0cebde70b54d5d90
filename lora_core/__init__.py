"""LoRA and QLoRA layers over PyTorch: plan, inject, train, save in PEFT's format, load strictly, merge exactly.

Names are imported on first use: `lora_core.files` and `lora_core.errors` cost no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_core.adapter_io import Identity, load_adapter, save_adapter
    from lora_core.config import LoraConfig
    from lora_core.errors import AdapterError, BaseMismatchError, ConfigError, LoraError, MergeError, TargetError
    from lora_core.identity import fingerprint
    from lora_core.injection import Target, inject, lora_layers, plan_targets, trained_weights
    from lora_core.layers import LoraLinear
    from lora_core.merging import merge, unmerge

_HOMES = {
    "adapter_io": ("Identity", "load_adapter", "save_adapter"),
    "config": ("LoraConfig",),
    "errors": ("AdapterError", "BaseMismatchError", "ConfigError", "LoraError", "MergeError", "TargetError"),
    "identity": ("fingerprint",),
    "injection": ("Target", "inject", "lora_layers", "plan_targets", "trained_weights"),
    "layers": ("LoraLinear",),
    "merging": ("merge", "unmerge"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterError",
    "BaseMismatchError",
    "ConfigError",
    "Identity",
    "LoraConfig",
    "LoraError",
    "LoraLinear",
    "MergeError",
    "Target",
    "TargetError",
    "fingerprint",
    "inject",
    "load_adapter",
    "lora_layers",
    "merge",
    "plan_targets",
    "save_adapter",
    "trained_weights",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
