"""Patterns select stacks of experts, and `LoraExperts` refuses other layouts with the reason."""

from collections.abc import Callable

import pytest
import torch
from adapted_mixtral import (
    BOTH,
    DOWN,
    EXPERTS,
    GATE_UP,
    HIDDEN,
    INNER,
    RANK,
    SCALE,
    VOCABULARY,
    adapt,
    make_mixtral,
)
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from lora_core import TargetError
from lora_core.layers.expert_layout import supports
from lora_core.layers.experts import LoraExperts
from lora_core.layers.parameters import parameter_targets
from lora_core.modules import plain_modules


def targets(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return parameter_targets(plain_modules(model), patterns)


def test_patterns_match_as_peft_config() -> None:
    model = make_mixtral()
    first, second = (f"model.layers.{layer}.mlp.experts" for layer in range(2))
    assert targets(model, ("down_proj", "gate_up_proj")) == {first: BOTH, second: BOTH}
    assert targets(model, (f"{second}.down_proj",)) == {second: DOWN}
    assert targets(model, ("layers.0.mlp.experts.gate_up_proj", "experts.down_proj")) == {
        first: BOTH,
        second: DOWN,
    }
    adapt(model)
    assert targets(model, ("gate_up_proj",)) == {first: GATE_UP, second: GATE_UP}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("proj", r"'proj' matches no parameter; .* experts.down_proj, experts.gate_up_proj"),
        ("lora_A.down_proj", "matches no parameter"),
        ("experts", "matches no parameter"),
        (
            "input_layernorm.weight",
            r"input_layernorm.weight of MixtralRMSNorm cannot be adapted: its shape is \(32,\)",
        ),
    ],
)
@pytest.mark.parametrize("adapted", [True, False])
def test_patterns_without_experts_are_refused(pattern: str, message: str, adapted: bool) -> None:
    model = adapt(make_mixtral()) if adapted else make_mixtral()
    with pytest.raises(TargetError, match=message):
        targets(model, ("down_proj", pattern))


def test_model_without_experts_is_refused(build_llama: Callable[..., nn.Module]) -> None:
    with pytest.raises(TargetError, match="the model has none"):
        targets(build_llama(), ("experts.down_proj",))


def test_experts_at_the_root_are_refused() -> None:
    with pytest.raises(TargetError, match="cannot be replaced in a parent"):
        targets(make_mixtral().model.layers[0].mlp.experts, ("down_proj",))


def test_experts_with_biases_are_refused() -> None:
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_local_experts=2,
    )
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    refuse(
        model.model.layers[0].mlp.experts,
        r"GptOssExperts cannot be adapted: it holds .*gate_up_proj_bias \(2, 64\)",
    )


@pytest.mark.parametrize(
    "flag", ["is_transposed", "has_bias", "has_post_expert_norm", "_is_expert_parallel"]
)
def test_experts_with_an_unsupported_flag_are_refused(flag: str) -> None:
    experts = make_mixtral().model.layers[0].mlp.experts
    setattr(experts, flag, True)
    refuse(experts, f"MixtralExperts cannot be adapted: its {flag} is True")


def test_experts_of_unsupported_shapes_are_refused() -> None:
    experts = make_mixtral().model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.transpose(1, 2))
    refuse(experts, r"its gate_up_proj is \(4, 96, 32\) and its down_proj \(4, 48, 32\)")
    experts.down_proj = nn.Parameter(
        torch.zeros(EXPERTS, HIDDEN, INNER).to(torch.float8_e4m3fn), requires_grad=False
    )
    refuse(experts, "its down_proj is stored in torch.float8_e4m3fn")


def test_module_without_the_experts_interface_is_refused() -> None:
    experts = nn.ParameterDict(
        {"gate_up_proj": torch.zeros(2, 8, 4), "down_proj": torch.zeros(2, 4, 4)}
    )
    refuse(experts, "it has no _apply_gate")
    refuse(nn.Identity(), "it holds no parameter directly")


def refuse(module: nn.Module, message: str) -> None:
    assert not supports(module)
    with pytest.raises(TargetError, match=message):
        LoraExperts(module, {"down_proj": (RANK, SCALE)})


@pytest.mark.parametrize("sizes", [{}, {"up_proj": (RANK, SCALE)}], ids=str)
def test_missing_stacks_are_refused(sizes: dict[str, tuple[int, float]]) -> None:
    with pytest.raises(TargetError, match="name one or both of gate_up_proj, down_proj"):
        LoraExperts(make_mixtral().model.layers[0].mlp.experts, sizes)
