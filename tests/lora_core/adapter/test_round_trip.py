"""A saved adapter loads bit for bit: with and without a sidecar, dense, 4-bit and wrapped.

test_parity_peft.py compares the same format with PEFT.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import Identity, LoraConfig, inject, load_adapter, lora_layers, save_adapter
from lora_core.adapter.json_files import IDENTITY
from lora_core.adapter.peft_config import read_config

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
Randomize = Callable[[nn.Module], None]
# PEFT 0.21 uses a name that transformers renames in version 6; this does not concern the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
ADAPTER_CONFIGS = {
    "all": LoraConfig(r=4, lora_alpha=8),
    "names": LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "up_proj"), lora_dropout=0.25),
    "regex-rslora": LoraConfig(
        r=3, lora_alpha=5, target_modules=r".*layers\.1\..*_proj", use_rslora=True
    ),
    "gaussian": LoraConfig(r=4, lora_alpha=0.5, init_lora_weights="gaussian"),
}
each_config = pytest.mark.parametrize(
    "config", ADAPTER_CONFIGS.values(), ids=ADAPTER_CONFIGS.keys()
)


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_adapter_gives_the_same_logits_bit_for_bit(
    build_llama: Build,
    randomize: Randomize,
    logits: Logits,
    tmp_path: Path,
    config: LoraConfig,
    dtype: torch.dtype,
) -> None:
    model = build_llama(dtype=dtype)
    fresh = build_llama(dtype=dtype)
    targets = inject(model, config, seed=0)
    randomize(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    assert load_adapter(fresh, tmp_path / "adapter") == targets
    assert torch.equal(logits(fresh), logits(model))
    assert not torch.equal(logits(fresh), logits(build_llama(dtype=dtype)))


def test_an_nf4_adapter_loads_bit_for_bit(
    build_nf4_llama: Build, randomize: Randomize, logits: Logits, tmp_path: Path
) -> None:
    model = build_nf4_llama()
    fresh = build_nf4_llama()
    config = ADAPTER_CONFIGS["all"]
    inject(model, config, seed=0)
    randomize(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))


@each_config
def test_a_saved_config_reads_back(build_llama: Build, tmp_path: Path, config: LoraConfig) -> None:
    model = build_llama()
    inject(model, config, seed=0)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    found = read_config(tmp_path / "adapter")
    assert found.scale == config.scale
    assert found.lora_dropout == config.lora_dropout
    assert found.use_rslora == config.use_rslora
    assert found.init_lora_weights == config.init_lora_weights


ORDERED = {
    "ranks": LoraConfig(r=6, lora_alpha=12, rank_pattern={r"layers\.0\..*": 3, "down_proj": 5}),
    "alphas": LoraConfig(
        r=4,
        lora_alpha=12,
        alpha_pattern={r"layers\.0\..*": 1, "down_proj": 64, "mlp.up_proj": 2, "k_proj": 3},
    ),
    "both": LoraConfig(
        r=4,
        lora_alpha=12,
        rank_pattern={"up_proj": 2, ".*_proj": 3},
        alpha_pattern={"up_proj": 9, ".*_proj": 2},
    ),
    "spectral initialization": LoraConfig(
        r=4,
        lora_alpha=12,
        init_lora_weights="olora",
        alpha_pattern={r"layers\.0\..*": 1, "down_proj": 64},
        use_rslora=True,
    ),
}


@pytest.mark.parametrize("config", ORDERED.values(), ids=ORDERED.keys())
def test_the_order_of_patterns_survives_a_file_with_sorted_keys(
    build_llama: Build,
    randomize: Randomize,
    logits: Logits,
    tmp_path: Path,
    config: LoraConfig,
) -> None:
    """The first matching pattern decides, in PEFT too; here it is the last one alphabetically."""
    model = build_llama()
    fresh = build_llama()
    inject(model, config, seed=0)
    randomize(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    load_adapter(fresh, tmp_path / "adapter")
    scales = {name: layer.scale for name, layer in lora_layers(model)}
    loaded_scales = {name: layer.scale for name, layer in lora_layers(fresh)}
    assert loaded_scales == pytest.approx(scales)
    assert len(set(scales.values())) > 1
    # A spectral initialization of doubled rank is summed in another order.
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-5, atol=1e-5)
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path / "adapter").base_model.model
    for name, scale in scales.items():
        assert theirs.get_submodule(name).scaling["default"] == pytest.approx(scale)


def test_saving_a_loaded_adapter_gives_the_same_bytes(
    build_llama: Build, adapter_folder: Path, small_config: LoraConfig
) -> None:
    model = build_llama()
    again = adapter_folder.with_name("again")
    load_adapter(model, adapter_folder)
    save_adapter(model, again, small_config, Identity(base="tiny llama"))
    assert digests(again) == digests(adapter_folder)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_an_adapter_without_a_sidecar_loads(
    build_llama: Build, adapted: LlamaForCausalLM, adapter_folder: Path, logits: Logits
) -> None:
    (adapter_folder / IDENTITY).unlink()
    model = build_llama()
    load_adapter(model, adapter_folder)
    assert torch.equal(logits(model), logits(adapted))


def test_a_wrapped_model_loads(
    build_llama: Build,
    adapted: LlamaForCausalLM,
    adapter_folder: Path,
    logits: Logits,
    wrapper: Callable[[nn.Module], nn.Module],
) -> None:
    model = build_llama()
    load_adapter(wrapper(model), adapter_folder)
    assert torch.equal(logits(model), logits(adapted))
