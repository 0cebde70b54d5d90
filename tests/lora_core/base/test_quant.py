"""On NF4 too, step 0 equals the base bit for bit; forward and gradients dequantize the weight.

The reference is bitsandbytes' own `dequantize_4bit`.
"""

import copy
from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from lora_core import LoraConfig, TargetError, fingerprint, inject, lora_layers
from lora_core.base.quant import base_weight

CONFIG = LoraConfig(r=4, lora_alpha=8)
DTYPES = [torch.float32, torch.bfloat16]


def linear_4bit(
    *,
    bias: bool = False,
    quant_type: str = "nf4",
    compute_dtype: torch.dtype | None = None,
    double: bool = True,
) -> nn.Module:
    """Return a quantized layer 64→96; moving it to a device quantizes it."""
    layer = bnb.nn.Linear4bit(
        64,
        96,
        bias=bias,
        quant_type=quant_type,
        compute_dtype=compute_dtype,
        compress_statistics=double,
    )
    return layer.to("cpu")


def adapted(layer: nn.Module, randomize: Callable[[nn.Module], None]) -> nn.Module:
    model = nn.ModuleDict({"fc": layer})
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=("fc",)), seed=0)
    randomize(model)
    return model["fc"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_zero_is_the_base_bit_for_bit(
    build_nf4_llama: Callable[..., LlamaForCausalLM],
    logits: Callable[[nn.Module], Tensor],
    dtype: torch.dtype,
) -> None:
    model = build_nf4_llama(dtype)
    before = logits(model)
    targets = inject(model, CONFIG, seed=0)
    assert [target.kind for target in targets] == ["nf4"] * 14
    assert all(layer.frozen.module.weight.quant_state.nested for _, layer in lora_layers(model))
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.eval()), before)


@pytest.mark.parametrize(("dtype", "compute_dtype"), [DTYPES, DTYPES[::-1]], ids=str)
def test_step_zero_follows_the_compute_dtype_of_the_base(
    build_nf4_llama: Callable[..., LlamaForCausalLM],
    logits: Callable[[nn.Module], Tensor],
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> None:
    model = build_nf4_llama(dtype, compute_dtype)
    before = logits(model)
    inject(model, CONFIG, seed=0)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compute_dtype", [None, *DTYPES], ids=str)
def test_step_zero_of_a_layer_with_a_bias_is_the_base(
    randomize: Callable[[nn.Module], None], dtype: torch.dtype, compute_dtype: torch.dtype | None
) -> None:
    base = linear_4bit(bias=True, compute_dtype=compute_dtype)
    layer = adapted(copy.deepcopy(base), randomize)
    nn.init.zeros_(layer.lora_B)
    x = torch.randn(5, 64, dtype=dtype)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("double", [True, False])
def test_forward_and_gradients_use_the_dequantized_weight(
    randomize: Callable[[nn.Module], None], double: bool
) -> None:
    layer = adapted(linear_4bit(double=double), randomize)
    weight = layer.base.weight
    dense = dequantize_4bit(weight.data, weight.quant_state).double()
    x = torch.randn(3, 5, 64, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    exact_x, a, b = (tensor.detach().double().requires_grad_() for tensor in inputs)
    update = F.linear(F.linear(exact_x, a), b)
    expected = F.linear(exact_x, dense) + 2.0 * update
    upstream = torch.randn(3, 5, 96)
    found = torch.autograd.grad(layer(x), inputs, upstream)
    reference = torch.autograd.grad(expected, (exact_x, a, b), upstream.double())
    # float32 over sums of at most 100 terms of about 1: 100 unit roundoffs are 6e-6.
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, exact in zip(found, reference, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=2e-5)


def test_no_dense_copy_of_the_weight_is_saved_for_backward(
    randomize: Callable[[nn.Module], None],
) -> None:
    layer = adapted(linear_4bit(), randomize)
    x = torch.randn(2, 64, requires_grad=True)
    saved: set[int] = set()

    def record(tensor: Tensor) -> Tensor:
        saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        layer(x)
    assert saved - {layer.lora_A.data_ptr(), layer.lora_B.data_ptr()} == {x.data_ptr()}


def test_an_evaluated_base_keeps_its_codes(
    build_nf4_llama: Callable[..., LlamaForCausalLM], logits: Callable[[nn.Module], Tensor]
) -> None:
    """On processors with AVX512-BF16, bitsandbytes repacks a layer when it is first evaluated.

    Layers without an adapter would change their fingerprint, and the adapter would be saved for a
    base that cannot be loaded.
    """
    model = build_nf4_llama()
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",)), seed=0)
    before = fingerprint(model)
    logits(model.eval())
    assert fingerprint(model) == before


def test_a_base_evaluated_before_is_refused_or_adapted_correctly(
    build_nf4_llama: Callable[..., LlamaForCausalLM], logits: Callable[[nn.Module], Tensor]
) -> None:
    """The repacked layout cannot be dequantized as NF4: logits would be noise."""
    model = build_nf4_llama()
    reference = logits(model)
    logits(model.eval())
    try:
        inject(model, CONFIG, seed=0)
    except TargetError:
        return
    # The layout rounds the block scales to bfloat16: a few times 2⁻⁹ of the logits.
    atol = 0.02 * reference.abs().max().item()
    torch.testing.assert_close(logits(model), reference, rtol=0, atol=atol)


def test_other_modules_have_no_base_weight() -> None:
    class DoubledLinear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class ConfiguredLinear(nn.Linear):
        def __init__(self, config: dict[str, int]) -> None:
            super().__init__(config["in"], config["out"])

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    others = [
        nn.Embedding(4, 4),
        nn.Conv1d(4, 4, 1),
        nn.LayerNorm(4),
        nn.Bilinear(2, 2, 2),
        DoubledLinear(4, 4),
        ConfiguredLinear({"in": 4, "out": 4}),  # no instance of it can be tested
    ]
    assert [base_weight(module) for module in others] == [None] * len(others)


def test_a_subclass_that_computes_the_same_product_is_a_linear_layer() -> None:
    """Equal to the subclass bit for bit: Falcon adds the bias after the product is rounded."""

    class Falcon(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            product = input @ self.weight.T
            return product if self.bias is None else product + self.bias

    class UnchangedLinear(nn.Linear):
        """A subclass that changes nothing."""

    x = torch.randn(5, 64)
    for module in (Falcon(64, 96), Falcon(64, 96, bias=False), UnchangedLinear(64, 96)):
        weight = base_weight(module)
        assert weight is not None
        assert weight.kind == "dense"
        assert weight.shape == (96, 64)
        with torch.no_grad():
            assert torch.equal(weight.linear(x, module.bias), module(x))


def test_a_projection_that_attention_reads_directly_has_no_base_weight() -> None:
    """nn.MultiheadAttention reads its projection's weight directly: an update has no effect."""
    assert base_weight(nn.MultiheadAttention(8, 2).out_proj) is None


@pytest.mark.parametrize(
    ("module", "kind"), [(nn.Linear(64, 96), "dense"), (linear_4bit(), "nf4")], ids=["dense", "nf4"]
)
def test_base_weight_has_kind_shape_and_dtype(module: nn.Module, kind: str) -> None:
    weight = base_weight(module)
    assert weight is not None
    assert (weight.kind, weight.shape) == (kind, (96, 64))
    assert weight.stored is module.weight
    for dtype in DTYPES:
        dense = weight.dense(dtype)
        assert dense.dtype == dtype
        assert dense.shape == (96, 64)
