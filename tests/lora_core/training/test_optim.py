"""LoRA+ groups agree with PEFT: the same learning rates, and the same weights after a step."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import ConfigError, LoraConfig, inject
from lora_core.training.optim import loraplus_groups

RATES = {"learning_rate": 1e-3, "ratio": 16.0}


class Tiny(nn.Module):
    """One layer of each kind that an adapter can train."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.embed(tokens))))


def peft_model(**settings: Any) -> PeftModel:
    defaults = {
        "target_modules": ["embed", "up"],
        "modules_to_save": ["norm", "head"],
        "bias": "all",
    }
    torch.manual_seed(0)
    return get_peft_model(Tiny(), PeftLoraConfig(r=2, lora_alpha=4, **(defaults | settings)))


def settings_by_name(
    model: nn.Module, groups: list[dict[str, Any]]
) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    return found


def peft_optimizer(
    model: nn.Module, embedding_lr: float = 1e-6, decay: float = 0.0
) -> torch.optim.Optimizer:
    options = {"loraplus_lr_embedding": embedding_lr, "loraplus_weight_decay": decay}
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=RATES["learning_rate"],
        loraplus_lr_ratio=RATES["ratio"],
        **options,
    )


def test_groups_agree_with_peft() -> None:
    model = peft_model()
    ours = loraplus_groups(model.named_parameters(), **RATES, weight_decay=0.1, embedding_lr=1e-6)
    expected = settings_by_name(model, peft_optimizer(model, decay=0.1).param_groups)
    found = settings_by_name(model, ours)
    assert found == expected
    assert set(found) == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert {lr for lr, _ in found.values()} == {1e-3, 16e-3, 1e-6}


def test_magnitude_has_the_learning_rate_of_peft_but_no_weight_decay() -> None:
    model = peft_model(use_dora=True, target_modules=["up"])
    groups = loraplus_groups(model.named_parameters(), **RATES, weight_decay=0.1)
    ours = settings_by_name(model, groups)
    expected = settings_by_name(model, peft_optimizer(model, decay=0.1).param_groups)
    different = [name for name in expected if ours[name] != expected[name]]
    assert [name.split(".")[-3] for name in different] == ["lora_magnitude_vector"]
    assert ours[different[0]] == (16e-3, 0.0)
    assert expected[different[0]] == (16e-3, 0.1)


def test_one_step_gives_the_same_weights_as_peft() -> None:
    model = peft_model()
    other = deepcopy(model)
    groups = loraplus_groups(model.named_parameters(), **RATES, weight_decay=0.1, embedding_lr=1e-6)
    train_one_step(model, torch.optim.AdamW(groups))
    train_one_step(other, peft_optimizer(other, decay=0.1))
    found = model.state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(found[name], value), name
    before = peft_model().state_dict()
    assert not all(torch.equal(found[name], value) for name, value in before.items())


def train_one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(10).reshape(2, 5)
    model(tokens).square().mean().backward()
    optimizer.step()


def test_injected_adapter_has_two_groups(build_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = build_llama()
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=0)
    groups = loraplus_groups(model.named_parameters(), **RATES, weight_decay=0.1)
    by_name = settings_by_name(model, groups)
    assert {(name.rpartition(".")[2], setting) for name, setting in by_name.items()} == {
        ("lora_A", (1e-3, 0.1)),
        ("lora_B", (16e-3, 0.1)),
    }
    assert len(by_name) == 2 * 14


def test_ratio_of_one_is_a_plain_optimizer() -> None:
    model = peft_model()
    groups = loraplus_groups(model.named_parameters(), learning_rate=1e-3, ratio=1.0)
    by_name = settings_by_name(model, groups)
    assert set(by_name.values()) == {(1e-3, 0.0)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", 0.0),
        ("ratio", -1.0),
        ("ratio", math.inf),
        ("learning_rate", 0.0),
        ("weight_decay", -0.1),
        ("embedding_lr", 0.0),
    ],
)
def test_value_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        loraplus_groups(peft_model().named_parameters(), **(RATES | {name: value}))


def test_model_without_a_trained_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of 7 trained parameters"):
        loraplus_groups(Tiny().named_parameters(), **RATES)
    with pytest.raises(ConfigError, match="none of 0 trained parameters"):
        loraplus_groups(peft_model().requires_grad_(False).named_parameters(), **RATES)


def test_embedding_lr_without_an_adapted_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match="no embedding is adapted"):
        loraplus_groups(
            peft_model(target_modules=["up"]).named_parameters(), **RATES, embedding_lr=1e-6
        )
