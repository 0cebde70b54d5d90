"""What `all-linear` leaves out is logged, with the setting that includes it."""

import logging

import pytest
import torch
from adapted_mixtral import make_mixtral
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from lora_core import LoraConfig, inject
from lora_core.left_out import left_out_by_all_linear
from lora_core.modules import adapter_parts

ENDINGS = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]


def settings(**changes: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, **changes})


def test_experts_and_router_of_mixtral_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = make_mixtral()
    inject(model, settings(), seed=0)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "experts.gate_up_proj (2), experts.down_proj (2), gate.weight (2)" in record.message
    assert f"target_parameters={ENDINGS}" in record.message


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT's own keys
def test_the_named_setting_adapts_what_peft_adapts(caplog: pytest.LogCaptureFixture) -> None:
    """PEFT doubles r and alpha of gate_up_proj, which are two layers in older files."""
    model = make_mixtral()
    config = settings(
        target_parameters=tuple(ENDINGS),
        rank_pattern={"gate_up_proj": 4},
        alpha_pattern={"gate_up_proj": 8},
    )
    inject(model, config, seed=0)
    assert not caplog.records
    options = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    reference = get_peft_model(make_mixtral(), PeftConfig(**options))
    expected = sorted(tuple(one.shape) for one in reference.parameters() if one.requires_grad)
    found = sorted(tuple(one.shape) for one in model.parameters() if one.requires_grad)
    assert found == expected


def test_models_without_other_matrices_have_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=20, intermediate_size=16, **sizes))
    inject(llama, settings(), seed=0)
    vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    inject(vit, settings(), seed=0)
    assert not caplog.records


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Mixture(nn.Module):
    """A router and experts next to plain layers, and a linear layer with its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.router = Doubled(8, 3)
        self.mlp.experts = nn.Module()
        self.mlp.experts.stack = nn.Parameter(torch.zeros(3, 8, 8))
        self.positions = nn.Parameter(torch.zeros(1, 5, 8))
        self.scaled = Doubled(8, 8)
        self.plain = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


def test_linear_layers_with_another_forward_are_named() -> None:
    model = Mixture()
    expected = {"experts.stack": 1, "router.weight": 1, "scaled.weight": 1}
    assert left_out_by_all_linear(model, settings()) == expected
    assert left_out_by_all_linear(model, settings(target_modules=("plain",))) == {}
    assert [name for name, _ in adapter_parts(model)] == []
    inject(model, settings(target_parameters=("experts.stack",)), seed=0)
    del expected["experts.stack"]
    assert left_out_by_all_linear(model, settings()) == expected
