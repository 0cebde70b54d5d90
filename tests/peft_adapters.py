"""Adapters that PEFT saves for a small model, and a way to change their files."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "v_proj", "down_proj"]
Tensors = dict[str, Tensor]
Values = dict[str, Any]
Edit = Callable[[Tensors, Values], None]


def save_peft_adapter(base: Path, folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Save an adapter with random factors, and for DoRA with random magnitudes, of rank 4."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    defaults: Values = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **(defaults | settings))
    base_model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        # PEFT 0.21 uses a name of transformers 5.23 that is deprecated.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = get_peft_model(base_model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def edit_adapter(source: Path, folder: Path, change: Edit) -> Path:
    """Copy an adapter and change its tensors and settings in place."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    change(tensors, values)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")
    return folder


def settings_of(folder: Path) -> Values:
    """Return the content of adapter_config.json."""
    values: Values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return values
