"""Models read sizes, dtypes and settings of their layers; every part of an adapter has them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lora_core import LoraConfig, inject, merge

OF_LINEAR = ("in_features", "out_features", "weight", "bias")
OF_EMBEDDING = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "weight")
OF_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")


class Described(nn.Linear):
    """A linear layer with further attributes: in the class, as a property and on the instance."""

    family = "described"

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.multiplier = 3

    @property
    def width(self) -> int:
        return self.in_features

    def computed(self, x: Tensor) -> Tensor:
        return self.forward(x)


def build() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {
        "described": Described(),
        "conv": nn.Conv2d(3, 4, 3, stride=2),
        "table": nn.Embedding(10, 8),
        "rows": nn.Embedding(10, 8),
        "saved": nn.Linear(8, 5),
        "norm": nn.LayerNorm(8),
    }
    return nn.ModuleDict(layers)


def test_every_part_has_the_attributes_of_its_base() -> None:
    model: Any = build()
    expected = {
        "described": (*OF_LINEAR, "family", "width", "multiplier"),
        "conv": (*OF_CONVOLUTION, "weight", "bias"),
        "table": OF_EMBEDDING,
        "rows": OF_EMBEDDING,
        "saved": OF_LINEAR,
        "norm": ("normalized_shape", "eps", "weight", "bias"),
    }
    values: dict[tuple[str, str], Any] = {}
    for path, names in expected.items():
        for name in names:
            values[path, name] = getattr(model[path], name)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=("described", "conv", "table"),
        trainable_token_indices={"rows": (1, 3)},
        modules_to_save=("saved",),
        bias="all",
    )
    inject(model, config, seed=0)
    assert all(type(part).__module__.startswith("lora_core") for part in model.values())
    for (path, name), value in values.items():
        found = getattr(model[path], name)
        if isinstance(value, Tensor):
            torch.testing.assert_close(found, value, rtol=0, atol=0)
        else:
            assert found == value


def test_method_that_computes_without_the_update_is_not_passed_on() -> None:
    model: Any = build()
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=("described",)), seed=0)
    with pytest.raises(AttributeError, match="no attribute 'computed'"):
        model["described"].computed(torch.randn(2, 8))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = model["described"].absent


@pytest.mark.parametrize("stacks", [("down_proj",), ("gate_up_proj", "down_proj")], ids=str)
def test_experts_have_their_attributes_and_effective_stacks(stacks: tuple[str, ...]) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 3}
    model: Any = nn.ModuleDict({"experts": MixtralExperts(MixtralConfig(**sizes))})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in model["experts"].named_parameters()}
    described = {name: getattr(model["experts"], name) for name in ("num_experts", "hidden_dim")}
    parameters = tuple(f"experts.{stack}" for stack in stacks)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=(), target_parameters=parameters)
    inject(model, config, seed=0)
    part = model["experts"]
    assert {name: getattr(part, name) for name in described} == described
    for name, value in before.items():
        assert torch.equal(getattr(part, name), value)
    for b in part.lora_B.values():
        b.data.normal_()
    effective = {name: getattr(part, name) for name in before}
    sum(value.sum() for value in effective.values()).backward()
    assert all(parameter.grad.any() for parameter in part.lora_A.values())
    merge(model)
    for name, value in effective.items():
        torch.testing.assert_close(getattr(model["experts"], name), value, rtol=1e-5, atol=1e-5)
