"""Parts are identified from a model's modules, and modules of unknown memory are listed."""

import pytest
import torch
from architectures import deepseek_v2, deepseek_v3, gpt2, llama, mixtral, opt
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.activations import ACT2FN

from lora_core import ConfigError, LoraConfig, plan_targets
from lora_core.budget.block_parts import (
    SMOOTH,
    Activation,
    ExpertsPart,
    LatentAttentionPart,
    Norm,
    PlainPart,
)
from lora_core.budget.budget import budget, fits
from lora_core.budget.parts import (
    blocks,
    linear_shapes,
    norms,
    parts,
    routers,
    uncounted,
)
from lora_core.budget.setup import Setup


def mamba() -> MambaForCausalLM:
    return MambaForCausalLM(
        MambaConfig(vocab_size=101, hidden_size=64, num_hidden_layers=2, state_size=4)
    )


def gpt_oss() -> GptOssForCausalLM:
    sizes = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return GptOssForCausalLM(
        GptOssConfig(
            **sizes, num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1
        )
    )


def test_llama_has_attention_and_gated_parts() -> None:
    attention = PlainPart(((64, 64), (32, 64), (32, 64)), (64, 64))
    gated = PlainPart(((128, 64), (128, 64)), (64, 128))
    assert parts(llama()) == [attention, gated] * 2
    assert list(norms(llama())) == [Norm(64, upcast=True)] * 5


def test_conv1d_shape_is_transposed() -> None:
    attention = PlainPart(((192, 64),), (64, 64))
    mlp = PlainPart(((256, 64),), (64, 256), Activation(input=True, others=3))
    assert parts(gpt2()) == [attention, mlp] * 2
    assert list(norms(gpt2())) == [Norm(64, upcast=False)] * 5


def test_latent_attention_matches_hand_calculation() -> None:
    """Queries and keys of 4 heads have width (8 + 8)·4, and the output of kv_b (8 + 16)·4."""
    attention = LatentAttentionPart(
        stream=64, inner=((64, 24), (96, 16)), query=64, writer=(64, 64)
    )
    assert parts(deepseek_v3())[0] == parts(deepseek_v2())[0] == attention
    assert parts(deepseek_v3(query=None))[0] == LatentAttentionPart(
        stream=64, inner=((96, 16),), query=64, writer=(64, 64)
    )
    widths = [norm.width for norm in norms(deepseek_v3().model.layers[0])]
    assert sorted(widths) == [16, 24, 64, 64]


def test_experts_and_routers_are_found() -> None:
    found = parts(mixtral())
    assert found[1] == ExpertsPart(chosen=2, writer=(64, 96), kernel="eager")
    assert list(routers(mixtral())) == [(4, 64)] * 2
    assert [type(part) for part in parts(deepseek_v3())] == [
        LatentAttentionPart,
        PlainPart,
        *[LatentAttentionPart, ExpertsPart, PlainPart] * 2,
    ]


def test_norms_of_single_heads_read_all_heads() -> None:
    config = Qwen3Config(
        vocab_size=101,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    assert sorted(norm.width for norm in norms(Qwen3ForCausalLM(config))) == [32, 64, 64, 64, 64]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", SMOOTH),
        ("gelu", SMOOTH),
        ("gelu_pytorch_tanh", SMOOTH),
        ("relu", Activation(input=False, others=0)),
        ("quick_gelu", Activation(input=True, others=1)),  # x · σ(1.702 x): x and σ
        ("relu2", Activation(input=False, others=1)),  # the square saves the output of ReLU
        ("gelu_new", Activation(input=True, others=3)),  # x, x / 2, tanh and 1 + tanh
    ],
)
def test_activation_matches_autograd(name: str, expected: Activation) -> None:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 8)
            self.down = nn.Linear(8, 4)
            self.act = ACT2FN[name]

    with torch.no_grad():  # planning must also work without gradients
        [part] = parts(Unit())
    assert isinstance(part, PlainPart)
    assert part.activation == expected


@pytest.mark.parametrize("build", [llama, gpt2, opt, mixtral, deepseek_v2, deepseek_v3])
def test_shapes_of_all_linear_layers_except_head_are_counted(
    build: type[PreTrainedModel],
) -> None:
    model = build()
    matrices = [
        module.weight.numel()
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    ]
    assert sum(out * wide for out, wide in linear_shapes(model)) == sum(matrices)
    assert len(blocks(model)) == model.config.num_hidden_layers


@pytest.mark.parametrize("build", [llama, gpt2, opt, mixtral, deepseek_v2, deepseek_v3])
def test_common_models_are_completely_counted(build: type[PreTrainedModel]) -> None:
    assert uncounted(build()) == ()


def test_modules_of_unknown_memory_are_listed() -> None:
    assert uncounted(mamba()) == ("Conv1d", "MambaMixer")
    assert uncounted(gpt_oss()) == ("GptOssAttention", "GptOssExperts", "GptOssTopKRouter")
    assert uncounted(mixtral("batched_mm")) == ("MixtralExperts", "MixtralTopKRouter")
    without = mixtral()
    for layer in without.model.layers:
        del layer.mlp.top_k, layer.mlp.gate.top_k
    assert uncounted(without) == ("MixtralExperts", "MixtralTopKRouter")


def test_norm_without_weights_is_uncounted() -> None:
    without_weights = nn.LayerNorm(4, elementwise_affine=False)
    assert uncounted(nn.Sequential(nn.Linear(4, 4), without_weights)) == ("LayerNorm",)
    assert uncounted(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))) == ()


def test_fits_raises_if_memory_is_a_lower_bound() -> None:
    model = mamba()
    targets = plan_targets(model, LoraConfig(r=2, lora_alpha=2, target_modules=("in_proj",)))
    cost = budget(model, Setup("lora", tokens=8), targets)
    assert cost.uncounted == ("Conv1d", "MambaMixer")
    with pytest.raises(ConfigError, match="without the activations of Conv1d, MambaMixer"):
        fits(cost, cost.memory_bytes)
    assert not fits(cost, cost.memory_bytes - 1)  # the counted memory alone is too much
