"""The groups of LoRA+ beside PEFT's: the same parameters at the same rates, and the same weights after a step."""

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
    """One layer of each sort that is trained beside or as an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.embed(tokens))))


def in_peft(**settings: Any) -> PeftModel:
    chosen = {
        "target_modules": ["embed", "up"],
        "modules_to_save": ["norm", "head"],
        "bias": "all",
    } | settings
    torch.manual_seed(0)
    return get_peft_model(Tiny(), PeftLoraConfig(r=2, lora_alpha=4, **chosen))


def settings_by_name(
    model: nn.Module, groups: list[dict[str, Any]]
) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


def theirs(
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


def test_groups_are_those_of_peft() -> None:
    model = in_peft()
    ours = loraplus_groups(model.named_parameters(), **RATES, weight_decay=0.1, embedding_lr=1e-6)
    expected = settings_by_name(model, theirs(model, decay=0.1).param_groups)
    found = settings_by_name(model, ours)
    assert found == expected
    assert set(found) == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert {rate for rate, _ in found.values()} == {1e-3, 16e-3, 1e-6}


def test_a_magnitude_has_the_rate_of_peft_but_is_not_pulled_to_zero() -> None:
    model = in_peft(use_dora=True, target_modules=["up"])
    ours = settings_by_name(
        model, loraplus_groups(model.named_parameters(), **RATES, weight_decay=0.1)
    )
    expected = settings_by_name(model, theirs(model, decay=0.1).param_groups)
    different = [name for name in expected if ours[name] != expected[name]]
    assert [name.split(".")[-3] for name in different] == ["lora_magnitude_vector"]
    assert (ours[different[0]], expected[different[0]]) == ((16e-3, 0.0), (16e-3, 0.1))


def test_one_step_gives_the_weights_of_peft() -> None:
    model, tokens = in_peft(), torch.arange(10).reshape(2, 5)
    other = deepcopy(model)
    ours = torch.optim.AdamW(
        loraplus_groups(model.named_parameters(), **RATES, weight_decay=0.1, embedding_lr=1e-6)
    )
    for each, optimizer in ((model, ours), (other, theirs(other, decay=0.1))):
        each(tokens).square().mean().backward()
        optimizer.step()
    before = in_peft().state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_an_adapter_of_ours_has_two_groups(build_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = build_llama()
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=0)
    by_name = settings_by_name(
        model, loraplus_groups(model.named_parameters(), **RATES, weight_decay=0.1)
    )
    assert {(name.rpartition(".")[2], setting) for name, setting in by_name.items()} == {
        ("lora_A", (1e-3, 0.1)),
        ("lora_B", (16e-3, 0.1)),
    }
    assert len(by_name) == 2 * 14


def test_a_ratio_of_one_is_a_plain_optimiser() -> None:
    model = in_peft()
    by_name = settings_by_name(
        model, loraplus_groups(model.named_parameters(), learning_rate=1e-3, ratio=1.0)
    )
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
def test_a_value_outside_its_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        loraplus_groups(in_peft().named_parameters(), **(RATES | {name: value}))


def test_a_model_without_a_trained_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of 7 trained parameters"):
        loraplus_groups(Tiny().named_parameters(), **RATES)
    with pytest.raises(ConfigError, match="none of 0 trained parameters"):
        loraplus_groups(in_peft().requires_grad_(False).named_parameters(), **RATES)


def test_an_embedding_lr_without_an_adapted_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match="no embedding is adapted"):
        loraplus_groups(
            in_peft(target_modules=["up"]).named_parameters(), **RATES, embedding_lr=1e-6
        )
