"""What PEFT makes of the names that experts had before transformers 5: honoured here where it can be said, else refused.

PEFT 0.21 turns target_modules of such names (w1, w2, w3; gate_proj, up_proj, down_proj; gate) into target_parameters, doubles
rank and alpha of what is now one stack, and puts the updates of single experts together when it loads them.
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
    TargetError,
    inject,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lora_core.spectrum.updates import read_updates

pytestmark = [
    # PEFT 0.21 asks transformers 5.23 under a name that transformers renames in 6; nothing about the adapter.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # It writes the doubled rank of a stack as a pattern, uses it, and says that nothing matched.
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
    """Let PEFT make an adapter with noise in A and B, and save it."""
    config = PeftLoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False
    )
    model = get_peft_model(seeded(build), config).eval()
    model.save_pretrained(folder)
    return model


HONOURED: dict[str, tuple[Build, list[str], dict[str, Any]]] = {
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


@pytest.mark.parametrize(("build", "targets", "written"), HONOURED.values(), ids=HONOURED.keys())
def test_rewritten_names_are_honoured(
    logits: Logits, tmp_path: Path, build: Build, targets: list[str], written: dict[str, Any]
) -> None:
    """Of the DeepSeek, PEFT leaves dense layers and shared experts of these names out; so do we, reading its file."""
    model, ours = theirs(build, targets, tmp_path), seeded(build)
    values = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert {
        key: set(values[key] or ()) if key != "rank_pattern" else values[key] for key in written
    } == written
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(
        logits(ours), logits(model), rtol=1e-5, atol=1e-5
    )  # the same sums in float32, in another order
    assert (logits(ours) - logits(seeded(build))).abs().max() > 1e-3


@pytest.mark.parametrize("build", [mixtral, deepseek_v3])
def test_a_router_among_all_linear_layers_is_refused(tmp_path: Path, build: Build) -> None:
    theirs(build, "all-linear", tmp_path)
    with pytest.raises(
        TargetError,
        match=r"mlp.gate.weight of \w+Top[kK]Router cannot be adapted: it holds weight .*; leave it out",
    ):
        load_adapter(seeded(build), tmp_path)


def save_single_experts(model: MixtralForCausalLM, folder: Path) -> dict[str, Tensor]:
    """Write an adapter as transformers 4 had PEFT write it; return ΔW of each expert's w1, w2 and w3 by its key."""
    generator, tensors, deltas = torch.Generator().manual_seed(4), {}, {}
    for layer in range(model.config.num_hidden_layers):
        for expert in range(4):
            for name, out, wide in (("w1", 96, 64), ("w2", 64, 96), ("w3", 96, 64)):
                path = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                a, b = (
                    torch.randn(shape, generator=generator) * 0.1 for shape in ((2, wide), (out, 2))
                )
                tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
                deltas[f"{layer}.{expert}.{name}"] = 1.5 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    PeftLoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["w1", "w2", "w3"]
    ).save_pretrained(folder)
    return deltas


def test_single_experts_are_refused_and_come_in_through_peft(
    logits: Logits, tmp_path: Path
) -> None:
    deltas = save_single_experts(model := seeded(mixtral), tmp_path / "old")
    with pytest.raises(
        AdapterError,
        match=r"each expert by itself, such as \S+experts\.0\.w1\S+, .* load the adapter .* with PEFT",
    ):
        load_adapter(model, tmp_path / "old")
    PeftModel.from_pretrained(seeded(mixtral), tmp_path / "old").save_pretrained(tmp_path / "new")
    load_adapter(ours := seeded(mixtral), tmp_path / "new")
    with torch.no_grad():  # the reference: every expert's weight by itself
        for number, layer in enumerate(model.model.layers):
            for expert in range(4):
                gate, up = (deltas[f"{number}.{expert}.{name}"] for name in ("w1", "w3"))
                layer.mlp.experts.gate_up_proj[expert] += torch.cat([gate, up])
                layer.mlp.experts.down_proj[expert] += deltas[f"{number}.{expert}.w2"]
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)


def save_ours(build: Build, config: LoraConfig, folder: Path) -> nn.Module:
    inject(model := seeded(build), config, seed=0)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(model, folder, config, Identity())
    return model


def test_an_adapter_that_peft_would_misplace_is_saved_with_a_warning(
    logits: Logits, tmp_path: Path
) -> None:
    """PEFT has no way to name a dense layer of these names; should that end, the last line fails and the warning can go."""
    config = LoraConfig(r=2, lora_alpha=3)
    with pytest.warns(
        UserWarning,
        match=r"PEFT takes model.layers.0.mlp.gate_proj to mean .*; load it with lora_core",
    ):
        model = save_ours(deepseek_v3, config, tmp_path / "adapter")
    load_adapter(ours := seeded(deepseek_v3), tmp_path / "adapter")
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
def test_what_peft_reads_rightly_is_saved_without_a_word(
    logits: Logits, tmp_path: Path, build: Build, config: LoraConfig
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = save_ours(build, config, tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * len(
        read_updates(tmp_path / "adapter")
    )
    loaded = PeftModel.from_pretrained(seeded(build), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
