"""LoRA and QLoRA layers for PyTorch: plan, inject, train, save as PEFT does, load strictly, merge.

Names are imported on first use, so `lora_core.files` and `lora_core.errors` do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_core.adapter.io import Identity, load_adapter, save_adapter
    from lora_core.adapter.pickles import convert_pickled_adapter
    from lora_core.bank.bank import Bank
    from lora_core.base.identity import fingerprint, fingerprint_of_folder
    from lora_core.base.pickled_base import convert_pickled_base
    from lora_core.calibration.data_driven import set_initialization
    from lora_core.calibration.ranks import eva_ranks
    from lora_core.config import LoraConfig
    from lora_core.errors import (
        AdapterError,
        BaseMismatchError,
        CheckpointError,
        ConfigError,
        ExportError,
        LoraError,
        MergeError,
        RoutingError,
        TargetError,
    )
    from lora_core.export.conversion import ConversionOptions, convert_adapter
    from lora_core.export.export import export_gguf, export_peft, export_vllm
    from lora_core.injection import inject, lora_layers, trained_weights
    from lora_core.inspection.adapter_report import inspect_adapter
    from lora_core.inspection.adapter_verification import verify_adapter
    from lora_core.inspection.difference import compare_adapters
    from lora_core.inspection.intrusion import count_intruders
    from lora_core.layers.linear import LoraLinear
    from lora_core.merging.fidelity import logit_divergence, merge_fidelity
    from lora_core.merging.merge import merge, unmerge
    from lora_core.merging.streaming import merge_checkpoint
    from lora_core.planning import plan_targets
    from lora_core.spectrum.intruders import intruder_dimensions
    from lora_core.targets import Target
    from lora_core.usage import check_used, unused_tensors

_NAMES_BY_MODULE = {
    "adapter.io": ("Identity", "load_adapter", "save_adapter"),
    "adapter.pickles": ("convert_pickled_adapter",),
    "bank.bank": ("Bank",),
    "config": ("LoraConfig",),
    "errors": (
        "AdapterError",
        "BaseMismatchError",
        "CheckpointError",
        "ConfigError",
        "ExportError",
        "LoraError",
        "MergeError",
        "RoutingError",
        "TargetError",
    ),
    "export.conversion": ("ConversionOptions", "convert_adapter"),
    "export.export": ("export_gguf", "export_peft", "export_vllm"),
    "inspection.difference": ("compare_adapters",),
    "inspection.intrusion": ("count_intruders",),
    "inspection.adapter_report": ("inspect_adapter",),
    "inspection.adapter_verification": ("verify_adapter",),
    "merging.fidelity": ("logit_divergence", "merge_fidelity"),
    "base.pickled_base": ("convert_pickled_base",),
    "base.identity": ("fingerprint", "fingerprint_of_folder"),
    "injection": ("inject", "lora_layers", "trained_weights"),
    "layers.linear": ("LoraLinear",),
    "merging.merge": ("merge", "unmerge"),
    "merging.streaming": ("merge_checkpoint",),
    "calibration.data_driven": ("set_initialization",),
    "calibration.ranks": ("eva_ranks",),
    "planning": ("plan_targets",),
    "spectrum.intruders": ("intruder_dimensions",),
    "targets": ("Target",),
    "usage": ("check_used", "unused_tensors"),
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = [
    "AdapterError",
    "Bank",
    "BaseMismatchError",
    "CheckpointError",
    "ConfigError",
    "ConversionOptions",
    "ExportError",
    "Identity",
    "LoraConfig",
    "LoraError",
    "LoraLinear",
    "MergeError",
    "RoutingError",
    "Target",
    "TargetError",
    "check_used",
    "compare_adapters",
    "convert_adapter",
    "convert_pickled_adapter",
    "convert_pickled_base",
    "count_intruders",
    "eva_ranks",
    "export_gguf",
    "export_peft",
    "export_vllm",
    "fingerprint",
    "fingerprint_of_folder",
    "inject",
    "inspect_adapter",
    "intruder_dimensions",
    "load_adapter",
    "logit_divergence",
    "lora_layers",
    "merge",
    "merge_checkpoint",
    "merge_fidelity",
    "plan_targets",
    "save_adapter",
    "set_initialization",
    "trained_weights",
    "unmerge",
    "unused_tensors",
    "verify_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULE_OF[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value
