"""How PEFT reads expert names from before transformers 5: followed if possible, else refused.

PEFT 0.21 converts target_modules with such names (w1, w2, w3; gate_proj, up_proj, down_proj; gate)
to target_parameters, doubles rank and alpha of what is now one stack, and combines the updates of
single experts when it loads them.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import deepseek_v3, mixtral
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MixtralForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from lora_core import (
    AdapterError,
    Identity,
    LoraConfig,
    inject,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lora_core.spectrum.updates import read_updates

pytestmark = [
    # PEFT 0.21 uses a name that transformers renames in 6; this does not concern the adapter.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT writes the doubled rank of a stack as a pattern, uses it, and warns of no match.
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
    ),
]
Build = Callable[[], PreTrainedModel]
Logits = Callable[[nn.Module], Tensor]
PREFIX = "base_model.model."
DOUBLED = {r".*\.gate_up_proj": 4}


def seeded(build: Build) -> PreTrainedModel:
    torch.manual_seed(0)
    return build().eval()


def qwen2_moe() -> Qwen2MoeForCausalLM:
    sizes = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    }
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**sizes, **experts, num_key_value_heads=2, mlp_only_layers=[0])
    )


def theirs(build: Build, targets: str | list[str], folder: Path) -> nn.Module:
    """Create and save a PEFT adapter with noise in A and B."""
    config = PeftLoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False
    )
    model = get_peft_model(seeded(build), config).eval()
    model.save_pretrained(folder)
    return model


READ: dict[str, tuple[Build, list[str], dict[str, Any]]] = {
    "mixtral": (
        mixtral,
        ["q_proj", "w1", "w2", "w3"],
        {
            "target_modules": {"q_proj"},
            "target_parameters": {"gate_up_proj", "down_proj"},
            "rank_pattern": DOUBLED,
        },
    ),
    "mixtral, one stack": (
        mixtral,
        ["w2"],
        {"target_modules": set(), "target_parameters": {"down_proj"}, "rank_pattern": {}},
    ),
    "deepseek": (
        deepseek_v3,
        ["q_a_proj", "gate_proj", "up_proj", "down_proj"],
        {
            "target_modules": {"q_a_proj"},
            "target_parameters": {"gate_up_proj", "down_proj"},
            "rank_pattern": DOUBLED,
        },
    ),
    "qwen2_moe": (
        qwen2_moe,
        ["q_proj", "down_proj"],
        {"target_modules": {"q_proj", "down_proj"}, "target_parameters": set(), "rank_pattern": {}},
    ),
}


@pytest.mark.parametrize(("build", "targets", "written"), READ.values(), ids=READ.keys())
def test_converted_names_load_as_in_peft(
    logits: Logits, tmp_path: Path, build: Build, targets: list[str], written: dict[str, Any]
) -> None:
    """In DeepSeek, PEFT omits dense layers and shared experts with these names; so do we."""
    model = theirs(build, targets, tmp_path)
    ours = seeded(build)
    values = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert values["rank_pattern"] == written["rank_pattern"]
    for key in ("target_modules", "target_parameters"):
        assert set(values[key] or ()) == written[key]
    load_adapter(ours, tmp_path)
    # The same sums in float32, in another order.
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(ours) - logits(seeded(build))).abs().max() > 1e-3


@pytest.mark.parametrize("build", [mixtral, deepseek_v3])
def test_a_router_among_all_linear_layers_loads_as_in_peft(
    logits: Logits, tmp_path: Path, build: Build
) -> None:
    model = theirs(build, "all-linear", tmp_path)
    ours = seeded(build)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)


def save_single_experts(model: MixtralForCausalLM, folder: Path) -> dict[str, Tensor]:
    """Write an adapter as PEFT did with transformers 4; return the ΔW of each expert's matrices."""
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for layer in range(model.config.num_hidden_layers):
        for expert in range(4):
            for name, outputs, inputs in (("w1", 96, 64), ("w2", 64, 96), ("w3", 96, 64)):
                path = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                a = torch.randn(2, inputs, generator=generator) * 0.1
                b = torch.randn(outputs, 2, generator=generator) * 0.1
                tensors[f"{PREFIX}{path}.lora_A.weight"] = a
                tensors[f"{PREFIX}{path}.lora_B.weight"] = b
                deltas[f"{layer}.{expert}.{name}"] = 1.5 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = ["w1", "w2", "w3"]
    config = PeftLoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=names)
    config.save_pretrained(folder)
    return deltas


def test_single_experts_are_refused_and_load_after_conversion_by_peft(
    logits: Logits, tmp_path: Path
) -> None:
    model = seeded(mixtral)
    deltas = save_single_experts(model, tmp_path / "old")
    message = r"separate update for each expert, such as \S+experts\.0\.w1\S+, .* with PEFT"
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, tmp_path / "old")
    PeftModel.from_pretrained(seeded(mixtral), tmp_path / "old").save_pretrained(tmp_path / "new")
    ours = seeded(mixtral)
    load_adapter(ours, tmp_path / "new")
    with torch.no_grad():  # the reference: every expert's weight updated separately
        for number, layer in enumerate(model.model.layers):
            for expert in range(4):
                gate = deltas[f"{number}.{expert}.w1"]
                up = deltas[f"{number}.{expert}.w3"]
                layer.mlp.experts.gate_up_proj[expert] += torch.cat([gate, up])
                layer.mlp.experts.down_proj[expert] += deltas[f"{number}.{expert}.w2"]
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)


def save_ours(build: Build, config: LoraConfig, folder: Path) -> nn.Module:
    model = seeded(build)
    inject(model, config, seed=0)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(model, folder, config, Identity())
    return model


def test_saving_an_adapter_that_peft_would_misplace_warns(logits: Logits, tmp_path: Path) -> None:
    """PEFT cannot name a dense layer with these names.

    Once it can, the last line fails and the warning can be removed.
    """
    config = LoraConfig(r=2, lora_alpha=3)
    message = "PEFT takes model.layers.0.mlp.gate_proj to mean .*; load it with lora_core"
    with pytest.warns(UserWarning, match=message):
        model = save_ours(deepseek_v3, config, tmp_path / "adapter")
    ours = seeded(deepseek_v3)
    load_adapter(ours, tmp_path / "adapter")
    assert torch.equal(logits(ours), logits(model))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        misplaced = PeftModel.from_pretrained(seeded(deepseek_v3), tmp_path / "adapter").eval()
    assert (logits(misplaced) - logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (mixtral, LoraConfig(r=2, lora_alpha=3)),
        (qwen2_moe, LoraConfig(r=2, lora_alpha=3, exclude_modules=("shared_expert_gate",))),
        (
            deepseek_v3,
            LoraConfig(r=2, lora_alpha=3, target_modules=("q_a_proj", "kv_b_proj", "o_proj")),
        ),
    ],
    ids=["mixtral", "qwen2_moe", "deepseek, attention alone"],
)
def test_saving_an_adapter_that_peft_reads_correctly_does_not_warn(
    logits: Logits, tmp_path: Path, build: Build, config: LoraConfig
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = save_ours(build, config, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(read_updates(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(seeded(build), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
