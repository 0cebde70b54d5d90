"""Replicas, as DataParallel makes them, use their own tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_core import LoraConfig, inject


def replica_of(module: nn.Module) -> Any:
    """Copy a module as `torch.nn.parallel.replicate` does: tensors take the place of parameters."""
    replica = module._replicate_for_data_parallel()  # type: ignore[operator]
    for name, child in module.named_children():
        setattr(replica, name, replica_of(child))
    for name, parameter in module.named_parameters(recurse=False):
        setattr(replica, name, parameter * 2)
    return replica


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: Conv1D(6, 4)])
@pytest.mark.parametrize("settings", [{}, {"bias": "lora_only"}], ids=["plain", "bias"])
def test_replica_computes_with_its_own_tensors(make: Any, settings: dict[str, Any]) -> None:
    model = nn.Sequential(make())
    config = LoraConfig(r=2, lora_alpha=2, target_modules=("0",), **settings)
    inject(model, config, seed=0)
    layer: Any = model[0]
    layer.lora_B.data.normal_()
    if settings:
        layer.trained_bias.data.normal_()
    replica = replica_of(model)
    x = torch.randn(3, 4)
    weight = 2 * layer.frozen.dense(torch.float32)
    expected = x @ weight.T + 4 * x @ (layer.lora_B @ layer.lora_A).T + 2 * layer.plain_bias
    torch.testing.assert_close(replica(x), expected, rtol=1e-5, atol=1e-5)
    assert layer.frozen.module is layer.base


class Table(nn.Module):
    """Embeds row numbers, so that every kind of module gets the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.table(x[:, 0].abs().long())
        return rows


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x)[0]
        return attended


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "embedding": (Table, {"target_modules": ("table",)}),
    "rows": (Table, {"target_modules": ("0",), "trainable_token_indices": {"table": (1, 2)}}),
    "attention": (Attending, {"target_modules": ("attention",)}),
    "parameter": (Attending, {"target_modules": (), "target_parameters": ("in_proj_weight",)}),
    "convolution": (lambda: nn.Conv1d(3, 4, 3), {"target_modules": ("1",)}),
    "dora": (lambda: nn.Linear(4, 4), {"target_modules": ("1",), "use_dora": True}),
    "saved": (lambda: nn.Linear(4, 4), {"target_modules": ("0",), "modules_to_save": ("1",)}),
    "biases": (lambda: nn.Linear(4, 4), {"target_modules": ("0",), "bias": "all"}),
}


@pytest.mark.parametrize(("make", "settings"), KINDS.values(), ids=KINDS.keys())
def test_replica_of_every_kind_computes_with_its_own_tensors(
    make: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    """A model whose parameters are doubled in place is the reference."""
    model = nn.Sequential(nn.Linear(4, 4), make())
    inject(model, LoraConfig(**{"r": 2, "lora_alpha": 2, **settings}), seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    x = torch.randn(3, 4)
    found = replica_of(model)(x)
    for parameter in model.parameters():
        parameter.data *= 2
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)
    found.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None for parameter in trained)
