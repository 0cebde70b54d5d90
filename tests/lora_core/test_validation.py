"""Every setting has an effect or raises: no setting is accepted and then ignored."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lora_core import Bank, ConfigError, LoraConfig, TargetError, inject, lora_layers
from lora_core.modules import adapter_parts
from lora_core.validation import plan_adapter

Build = Callable[..., LlamaForCausalLM]
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


class Blocks(nn.Module):
    """Two numbered blocks of one kind of layer, and a head."""

    def __init__(self, make: Callable[[], nn.Module], x: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"one": make(), "two": make()}) for _ in range(2))
        self.head = nn.Linear(4, 4, bias=False)
        self.x = x

    def forward(self) -> Tensor:
        outputs = []
        for block in self.blocks:
            for layer in block.values():
                outputs.append(torch.tanh(layer(self.x)).flatten())
        return torch.cat(outputs)


class MixtureOfExperts(nn.Module):
    """A mixture of experts that reads the same tokens in each call."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        self.model = MixtralForCausalLM(
            MixtralConfig(vocab_size=20, **sizes, num_local_experts=2, num_experts_per_tok=1)
        )

    def forward(self) -> Tensor:
        return self.model(input_ids=torch.arange(6)[None], use_cache=False).logits


def linear() -> nn.Module:
    return Blocks(
        lambda: nn.Linear(12, 10), torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    )


def embedding() -> nn.Module:
    return Blocks(lambda: nn.Embedding(12, 10), torch.arange(12))


def conv() -> nn.Module:
    return Blocks(
        lambda: nn.Conv2d(12, 10, 3),
        torch.randn(2, 12, 5, 5, generator=torch.Generator().manual_seed(0)),
    )


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "embedding": embedding,
    "conv": conv,
    "experts": MixtureOfExperts,
}
SETTINGS: list[dict[str, Any]] = [
    {"r": 2},
    {"lora_alpha": 5},
    {"exclude_modules": ("two",)},
    {"exclude_modules": r".*two"},
    {"layers_to_transform": (1,)},
    {"rank_pattern": {"one": 2}},
    {"rank_pattern": {"gate_up_proj": 2}},
    {"alpha_pattern": {r"0\.two": 3}},
    {"alpha_pattern": {r"0\.mlp\.experts\.down_proj": 3}},
    {"modules_to_save": ("head",)},
    {"modules_to_save": ("lm_head",)},
    {"trainable_token_indices": {"embed_tokens": (2,)}},
    {"lora_dropout": 0.5},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"lora_bias": True},
    {"use_rslora": True},
    {"use_dora": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_2"},
]


Observation = tuple[dict[str, Tensor], Tensor]
"""Initial trained parameters, and the output in training mode after a random update of them."""


def observe(kind: str, settings: Mapping[str, Any]) -> Observation:
    """Inject an adapter with the settings into a model of this kind."""
    torch.manual_seed(3)
    model = MODELS[kind]().train()
    targets: dict[str, Any] = {"target_modules": ("one", "two")}
    if kind == "experts":
        targets = {"target_modules": (), "target_parameters": EXPERTS}
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **targets, **settings}), seed=1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in trained.items()}
    generator = torch.Generator().manual_seed(4)
    for name in sorted(trained):
        trained[name].data += torch.randn(trained[name].shape, generator=generator)
    torch.manual_seed(5)
    return initial, model().detach()


def is_same(one: Observation, other: Observation) -> bool:
    parameters, output = one
    other_parameters, other_output = other
    if parameters.keys() != other_parameters.keys():
        return False
    for name, parameter in parameters.items():
        if not torch.equal(parameter, other_parameters[name]):
            return False
    return torch.equal(output, other_output)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_setting_has_effect_or_raises(kind: str, settings: dict[str, Any]) -> None:
    default = observe(kind, {})
    assert is_same(default, observe(kind, {}))
    try:
        changed = observe(kind, settings)
    except (ConfigError, TargetError) as error:
        assert next(iter(settings)) in str(error)
    else:
        assert not is_same(changed, default)


WITH_EFFECT = {
    "linear": {
        "lora_dropout": 0.5,
        "lora_bias": True,
        "bias": "lora_only",
        "init_lora_weights": "pissa",
    },
    "embedding": {"use_dora": True, "rank_pattern": {"one": 2}},
    "conv": {
        "lora_dropout": 0.5,
        "lora_bias": True,
        "bias": "lora_only",
        "init_lora_weights": "orthogonal",
    },
    "experts": {"rank_pattern": {"gate_up_proj": 2}, "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, field) for kind, settings in WITH_EFFECT.items() for field in settings],
)
def test_supported_setting_has_effect(kind: str, field: str) -> None:
    changed = observe(kind, {field: WITH_EFFECT[kind][field]})
    assert not is_same(changed, observe(kind, {}))


# --- settings that some of the targets would ignore ---


def llama_config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ("q_proj", "lm_head"), "layers_to_transform": (1,)},
            "'lm_head' has no effect: exclude_modules and layers_to_transform leave nothing of it",
        ),
        (
            {"target_modules": ("q_proj", "up_proj"), "exclude_modules": ("up_proj",)},
            "'up_proj' has no effect",
        ),
        (
            {"exclude_modules": ("up_proj", "donw_proj")},
            "exclude_modules names 'donw_proj', which is not a target",
        ),
        (
            {"exclude_modules": ("up_proj", "lm_head")},
            "exclude_modules names 'lm_head', which is not a target",
        ),
        (
            {"target_modules": ("q_proj", "embed_tokens"), "init_lora_weights": "pissa"},
            "'pissa' has no effect on model.embed_tokens",
        ),
        (
            {"target_modules": ("q_proj", "embed_tokens"), "init_lora_weights": "orthogonal"},
            "'orthogonal' has no effect on model.embed",
        ),
        (
            {"target_modules": ("q_proj", "k_proj"), "r": 17, "init_lora_weights": "olora"},
            r"twice 17 exceeds .*k_proj of shape 32×64",
        ),
        (
            {"target_modules": ("embed_tokens",), "lora_dropout": 0.1},
            r"lora_dropout=0\.1 has no effect",
        ),
        (
            {"target_modules": ("q_proj",), "modules_to_save": ("norm",), "bias": "lora_only"},
            "bias='lora_only' has no effect",
        ),
    ],
)
def test_setting_that_some_targets_ignore_raises(
    build_llama: Build, refuses: Callable[..., None], fields: dict[str, Any], message: str
) -> None:
    """Injection, a bank and a plan raise the same error."""
    model = build_llama()
    refuses(model, lambda: inject(model, llama_config(**fields), seed=0), TargetError, message)
    with pytest.raises(TargetError, match=message):
        Bank(build_llama()).add("one", llama_config(**fields), seed=0)
    if "bias" not in fields:
        with pytest.raises(TargetError, match=message):
            plan_adapter(build_llama(), llama_config(**fields))


def test_eva_on_embedding_raises(build_llama: Build, tokens: Tensor) -> None:
    model = build_llama()
    fields = {"target_modules": ("q_proj", "embed_tokens"), "init_lora_weights": "eva"}
    with pytest.raises(TargetError, match=r"'eva' has no effect on model\.embed_tokens"):
        inject(model, llama_config(**fields), seed=0, data=[lambda: model(input_ids=tokens)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ("q_proj",), "layers_to_transform": (1,)},
            r"layers_to_transform=\(1,\) has no effect on target_parameters",
        ),
        (
            {"target_modules": (), "exclude_modules": ("q_proj",)},
            "exclude_modules=.* has no effect on target_parameters",
        ),
        (
            {"target_modules": (), "init_lora_weights": "orthogonal"},
            r"'orthogonal' has no effect on .*experts.* \(experts\)",
        ),
        ({"target_modules": (), "init_lora_weights": "olora"}, "'olora' has no effect on"),
    ],
)
def test_setting_that_experts_do_not_support_raises(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        inject(MixtureOfExperts(), llama_config(target_parameters=EXPERTS, **fields), seed=0)


def test_bias_of_fully_trained_module_raises() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(8, 8, bias=False), "head": nn.Linear(8, 8)})
    config = llama_config(target_modules=("proj",), modules_to_save=("head",), bias="all")
    with pytest.raises(TargetError, match="bias='all' has no effect"):
        inject(model, config, seed=0)


def test_overlapping_names_with_effect_are_accepted(build_llama: Build) -> None:
    fields = {
        "target_modules": ("q_proj", "1.mlp.up_proj"),
        "exclude_modules": ("0.self_attn.q_proj",),
        "layers_to_transform": (0, 1),
    }
    model = build_llama()
    inject(model, llama_config(**fields), seed=0)
    assert [name for name, _ in lora_layers(model)] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert len(list(adapter_parts(model))) == 2
