"""Replicas, as DataParallel makes them, use their own tensors; first derivatives are exact."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
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


@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}], ids=["plain", "bias in B"])
def test_gradcheck_passes_in_float64(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 5))
    inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=("0",), **settings), seed=0)
    model.double()
    layer: Any = model[0]
    layer.lora_B.data.normal_()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, a: Tensor, b: Tensor) -> Any:
        return functional_call(model, {"0.lora_A": a, "0.lora_B": b}, (x,))

    assert torch.autograd.gradcheck(product, (x, layer.lora_A, layer.lora_B))
    [gradient] = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
