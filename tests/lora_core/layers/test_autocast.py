"""Under autocast an adapted layer equals its base at step 0 and keeps gradient dtypes.

Without autocast no bit changes.

On the CPU autocast multiplies in bfloat16, whose unit roundoff is 2⁻⁹ ≈ 0.002.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from trained_noise import add_noise
from transformers.pytorch_utils import Conv1D

from lora_core import LoraConfig, inject
from lora_core.base.quant import DenseWeight, disable_cpu_repacking
from lora_core.layers.functional import ScaledFactors, lora_linear
from lora_core.layers.linear import keep_product_dtype

IN, OUT, V = 64, 96, 101


@contextmanager
def autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    with torch.autocast("cpu", dtype):
        yield


def linear_4bit(kind: str, compute_dtype: torch.dtype | None = None) -> nn.Module:
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type=kind, compute_dtype=compute_dtype).to("cpu")
    disable_cpu_repacking(layer)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Linear(IN, OUT),
    "dense without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "dense in bfloat16": lambda: nn.Linear(IN, OUT, dtype=torch.bfloat16),
    "transposed": lambda: Conv1D(OUT, IN),
    "nf4": lambda: linear_4bit("nf4"),
    "nf4 in float32": lambda: linear_4bit("nf4", torch.float32),
    "fp4 in bfloat16": lambda: linear_4bit("fp4", torch.bfloat16),
    "int8": lambda: bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False).to("cpu"),
    "conv": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "embedding": lambda: nn.Embedding(V, 16),
}
each_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS.keys())
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])


def built(build: Callable[[], nn.Module], **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Return a layer, and an adapted copy of it at step 0."""
    torch.manual_seed(3)
    base = build()
    model = nn.ModuleDict({"fc": copy.deepcopy(base)})
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=("fc",), **settings), seed=0)
    return base, model["fc"]


def inputs(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    base = getattr(layer, "base", layer)
    if isinstance(base, nn.Embedding):
        return torch.randint(0, V, (2, 9))
    shape = (2, 8, 6, 6) if isinstance(base, nn.Conv2d) else (2, 9, IN)
    return torch.randn(*shape, dtype=dtype)


@each_layer
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_zero_is_the_base_bit_for_bit(
    build: Callable[[], nn.Module], training: bool, dtype: torch.dtype
) -> None:
    base, layer = (each.train(training) for each in built(build))
    x = inputs(base, dtype)
    with autocast():
        found, expected = layer(x), base(x)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@each_layer
@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"bias": "lora_only"}], ids=["plain", "dora", "bias"]
)
def test_autocast_result_is_the_rounded_float32_result(
    build: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    """Inputs, factors and the sum are rounded to bfloat16: a few roundoffs of the largest terms.

    int8 rounds inputs as well.
    """
    if "bias" in settings and getattr(build(), "bias", None) is None:
        pytest.skip("the layer has no bias to train")
    base, layer = built(build, **settings)
    exact = copy.deepcopy(add_noise(layer)).float()
    x = inputs(layer)
    with autocast():
        assert layer(x).dtype == base(x).dtype
    found = results(layer, x, autocast())
    reference = results(exact, x, nullcontext())
    assert (found[0] - reference[0]).abs().max() < 0.03 * reference[0].abs().max()
    for gradient, expected in zip(found[1:], reference[1:], strict=True):
        assert (gradient - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("kind", ["nf4 in float32", "fp4 in bfloat16"])
def test_a_training_may_keep_the_dtype_of_products(kind: str) -> None:
    """The output of a 4-bit layer then has the values before the base's cast to float32."""
    _, layer = built(LAYERS[kind])
    add_noise(layer)
    x = inputs(layer)
    with autocast():
        usual = layer(x)
        keep_product_dtype(nn.ModuleList([layer]))
        kept = layer(x)
    assert (usual.dtype, kept.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(usual, kept.float())


def results(layer: nn.Module, x: Tensor, context: AbstractContextManager[None]) -> list[Tensor]:
    """Return a layer's output and its gradients, all in float32.

    The gradients are those of x, if it has one, and of the trained parameters.
    """
    x = x.clone().requires_grad_(x.is_floating_point())
    inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    with context:
        y = layer(x)
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    gradients = torch.autograd.grad(y, inputs, upstream)
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in inputs]
    return [y.detach().float(), *(gradient.float() for gradient in gradients)]


@each_layer
def test_backward_inside_autocast_equals_backward_outside(build: Callable[[], nn.Module]) -> None:
    layer = add_noise(built(build)[1])
    x = inputs(layer)
    with autocast():
        inside = results(layer, x, nullcontext())
    outside = results(layer, x, autocast())
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))


def plain(x: Tensor, layer: nn.Linear, update: ScaledFactors, upstream: Tensor) -> list[Tensor]:
    """Return the product and its gradients, computed step by step without autocast."""
    a = update.a.to(x.dtype)
    b = update.b.to(x.dtype)
    y = F.linear(x, layer.weight, layer.bias)
    y.addmm_(x @ a.T, b.T, alpha=update.scale)
    down = (upstream @ b) * update.scale
    grad_x = upstream @ layer.weight
    grad_x.addmm_(down, a)
    grad_a = down.T @ x
    grad_b = upstream.T @ ((x @ a.T) * update.scale)
    return [y, grad_x, grad_a.to(update.a.dtype), grad_b.to(update.b.dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_without_autocast_is_bit_exact(dtype: torch.dtype) -> None:
    layer = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    x = torch.randn(7, IN, dtype=dtype, requires_grad=True)
    upstream = torch.randn(7, OUT, dtype=dtype)
    a = torch.randn(4, IN, requires_grad=True)
    b = torch.randn(OUT, 4, requires_grad=True)
    y = lora_linear(x, DenseWeight(layer), bias=layer.bias, update=ScaledFactors(a, b, 1.7))
    found = [y, *torch.autograd.grad(y, (x, a, b), upstream)]
    expected = plain(x.detach(), layer, ScaledFactors(a.detach(), b.detach(), 1.7), upstream)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_q_k_v_save_one_x_in_its_original_dtype() -> None:
    x = torch.randn(2, 9, IN, requires_grad=True)
    layers = [built(LAYERS["dense"])[1] for _ in "qkv"]
    known = {p.data_ptr() for layer in layers for p in layer.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.stack([layer(x) for layer in layers])
    assert saved == {x.data_ptr(): x.nbytes}


def test_checkpointed_block_has_the_same_gradients() -> None:
    layer = add_noise(built(LAYERS["dense"])[1])
    x = inputs(layer)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    plain_results = results(layer, x, autocast())
    checkpointed = results(Checkpointed(), x, autocast())
    for one, other in zip(plain_results, checkpointed, strict=True):
        assert torch.equal(one, other)
