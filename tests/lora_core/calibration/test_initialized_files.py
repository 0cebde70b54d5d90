"""Adapters with a data-driven initialization are exchanged with PEFT as plain adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    AdapterError,
    Identity,
    LoraConfig,
    inject,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lora_core.adapter.json_files import read_json

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
# Sums of at most 128 float32 products, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:lora with eva initialization used with low_cpu_mem_usage=False:UserWarning"
    ),
]


def config(init: str, **fields: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, init_lora_weights=init, **fields)


@pytest.fixture
def initialized(
    build_nf4_llama: Build,
    originals: dict[str, Tensor],
    calibration_batches: Callable[[nn.Module], list[Callable[[], object]]],
) -> Callable[[str], LlamaForCausalLM]:
    """Return a factory of 4-bit models with an adapter of the given initialization."""

    def make(init: str) -> LlamaForCausalLM:
        model = build_nf4_llama()
        if init == "eva":
            inject(model, config(init), seed=1, data=calibration_batches(model))
        else:
            inject(model, config(init), seed=1, original=originals)
        return model

    return make


@pytest.mark.parametrize("init", ["eva", "loftq"])
def test_saved_adapter_is_a_plain_adapter_of_the_4_bit_base(
    initialized: Callable[[str], LlamaForCausalLM],
    build_nf4_llama: Build,
    logits: Logits,
    tmp_path: Path,
    init: str,
) -> None:
    """PEFT requires more settings for both values, so the file contains `true`."""
    model = initialized(init)
    for _, layer in lora_layers(model):
        layer.lora_B.data += 0.05
    save_adapter(model, tmp_path / "ours", config(init), Identity())
    written = read_json(tmp_path / "ours" / "adapter_config.json")
    assert (written["init_lora_weights"], written["r"]) == (True, 4)
    reloaded = build_nf4_llama()
    load_adapter(reloaded, tmp_path / "ours")
    assert torch.equal(logits(reloaded), logits(model))
    # In training mode, because bitsandbytes quantizes again in evaluation mode.
    theirs = PeftModel.from_pretrained(build_nf4_llama(), tmp_path / "ours").train()
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)
    assert (logits(model) - logits(build_nf4_llama())).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
def test_peft_loads_gaussian_adapter_with_lora_bias(
    build_llama: Build, logits: Logits, randomize: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """PEFT rejects `gaussian` with lora_bias; loaded weights do not need an initialization."""
    model = build_llama()
    with_bias = config("gaussian", lora_bias=True)
    inject(model, with_bias, seed=1)
    randomize(model)
    save_adapter(model, tmp_path, with_bias, Identity())
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_adapter_of_peft_loads(
    build_llama: Build, tokens: Tensor, logits: Logits, tmp_path: Path, rho: float
) -> None:
    """Also with redistributed ranks, and with layers that PEFT removes because of their rank."""
    settings = PeftLoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, tau=0.9),
    )
    theirs = get_peft_model(build_llama(), settings)
    initialize_lora_eva_weights(theirs, [{"input_ids": tokens}], show_progress_bar=False)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05
    theirs.eval().save_pretrained(tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["init_lora_weights"] == "eva"
    model = build_llama()
    targets = load_adapter(model, tmp_path)
    assert (len({target.rank for target in targets}) > 1) == (rho > 1)
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)


def test_loftq_adapter_of_peft_raises(build_llama: Build, adapter_folder: Path) -> None:
    """PEFT's LoftQ changes the base."""
    path = adapter_folder / "adapter_config.json"
    text = path.read_text()
    path.write_text(text.replace('"init_lora_weights": true', '"init_lora_weights": "loftq"'))
    with pytest.raises(AdapterError, match="init_lora_weights='loftq', which changes the base"):
        load_adapter(build_llama(), adapter_folder)
