"""Higher derivatives and per-sample gradients of adapted layers are exact."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call, jacrev, vmap
from torch.func import grad as func_grad
from transformers.pytorch_utils import Conv1D

from lora_core import LoraConfig, inject

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 5),
    "without bias": lambda: nn.Linear(4, 5, bias=False),
    "transposed": lambda: Conv1D(5, 4),
    "convolution": lambda: nn.Sequential(nn.Unflatten(-1, (1, 4)), nn.Conv1d(1, 5, 4)),
}


def adapted(build: Callable[[], nn.Module], **settings: Any) -> nn.Sequential:
    """Return a model in float64 whose every factor is drawn."""
    torch.manual_seed(0)
    model = nn.Sequential(build())
    target = "0.1" if isinstance(model[0], nn.Sequential) else "0"
    config = {"r": 2, "lora_alpha": 3, "target_modules": (target,), **settings}
    inject(model, LoraConfig(**config), seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model.double()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def merged(model: nn.Module, values: dict[str, Tensor], x: Tensor) -> Any:
    return functional_call(model, values, (x,))


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES.keys())
@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}, {"bias": "lora_only"}], ids=str)
def test_first_and_second_derivatives(
    build: Callable[[], nn.Module], settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    if "bias" in settings and "without bias" in request.node.name:
        pytest.skip("the layer has no bias to train")
    model = adapted(build, **settings)
    names, values = zip(*trained(model).items(), strict=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, *values: Tensor) -> Any:
        return merged(model, dict(zip(names, values, strict=True)), x)

    assert gradcheck(product, (x, *values))
    assert gradgradcheck(product, (x, *values))


def test_gradient_penalty_equals_that_of_dense_weights() -> None:
    """Autograd over x (W0 + s·B·A)ᵀ, written out, is the reference."""
    model = adapted(MODULES["without bias"])
    layer: Any = model[0]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    penalties = []
    for weight in (None, layer.base.weight + 1.5 * layer.lora_B @ layer.lora_A):
        y = model(x) if weight is None else x @ weight.T
        [gradient] = grad(y.square().sum(), x, create_graph=True)
        penalty = gradient.norm(dim=1).square().sum()
        penalties.append(grad(penalty, [layer.lora_A, layer.lora_B, x]))
    for found, expected in zip(*penalties, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES.keys())
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_per_sample_gradients_equal_those_of_a_loop(
    build: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    model = adapted(build, **settings)
    values = trained(model)
    x = torch.randn(6, 4, dtype=torch.float64)

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        output: Tensor = merged(model, values, sample[None])
        return output.square().sum()

    found = vmap(func_grad(loss), in_dims=(None, 0))(dict(values), x)
    for index, sample in enumerate(x):
        expected = grad(model(sample[None]).square().sum(), list(values.values()))
        for name, gradient in zip(values, expected, strict=True):
            torch.testing.assert_close(found[name][index], gradient)


def test_several_adapters_in_one_vmap_equal_a_loop() -> None:
    model = adapted(MODULES["linear"])
    stacked = {
        name: torch.randn(3, *value.shape).double() for name, value in trained(model).items()
    }
    x = torch.randn(2, 4, dtype=torch.float64)
    found = vmap(lambda values: merged(model, values, x))(stacked)
    for index in range(3):
        one = {name: value[index] for name, value in stacked.items()}
        torch.testing.assert_close(found[index], merged(model, one, x))


def test_dropout_in_a_vmap_is_drawn_for_each_sample() -> None:
    model = adapted(MODULES["linear"], lora_dropout=0.5).train()
    x = torch.ones(8, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(model)(x)
    different = vmap(model, randomness="different")(x)
    assert len(different.unique(dim=0)) > 1


def test_jacobian_is_the_effective_weight() -> None:
    model = adapted(MODULES["linear"])
    layer: Any = model[0]
    jacobian = jacrev(model)(torch.randn(4, dtype=torch.float64))
    torch.testing.assert_close(jacobian, layer.weight)
