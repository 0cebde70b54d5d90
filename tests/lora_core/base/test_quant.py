"""Over NF4 the law is the same: step 0 is the base bit for bit, and forward and gradients use the dequantised weight.

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
    """Return a quantised layer 64→96; moving it to a device is what quantises."""
    layer = bnb.nn.Linear4bit(
        64,
        96,
        bias=bias,
        quant_type=quant_type,
        compute_dtype=compute_dtype,
        compress_statistics=double,
    )
    return layer.to("cpu")


def adapted(layer: nn.Module, randomise: Callable[[nn.Module], None]) -> nn.Module:
    model = nn.ModuleDict({"fc": layer})
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=("fc",)), seed=0)
    randomise(model)
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
    assert {target.kind for target in targets} == {"nf4"} and len(targets) == 14
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
def test_step_zero_of_a_layer_with_a_bias(
    randomise: Callable[[nn.Module], None], dtype: torch.dtype, compute_dtype: torch.dtype | None
) -> None:
    base = linear_4bit(bias=True, compute_dtype=compute_dtype)
    layer = adapted(copy.deepcopy(base), randomise)
    nn.init.zeros_(layer.lora_B)
    x = torch.randn(5, 64, dtype=dtype)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("double", [True, False])
def test_forward_and_gradients_use_the_dequantised_weight(
    randomise: Callable[[nn.Module], None], double: bool
) -> None:
    layer = adapted(linear_4bit(double=double), randomise)
    weight = layer.base.weight
    dense = dequantize_4bit(weight.data, weight.quant_state).double()
    x = torch.randn(3, 5, 64, requires_grad=True)
    exact_x, a, b = (t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    expected = F.linear(exact_x, dense) + 2.0 * F.linear(F.linear(exact_x, a), b)
    upstream = torch.randn(3, 5, 96)
    found = torch.autograd.grad(layer(x), (x, layer.lora_A, layer.lora_B), upstream)
    reference = torch.autograd.grad(expected, (exact_x, a, b), upstream.double())
    # float32 over sums of at most 100 terms of about 1: 100 unit roundoffs are 6e-6.
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(found, reference, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=2e-5)


def test_no_dense_copy_of_the_weight_is_kept(randomise: Callable[[nn.Module], None]) -> None:
    layer = adapted(linear_4bit(), randomise)
    x = torch.randn(2, 64, requires_grad=True)
    parameters, saved = {layer.lora_A.data_ptr(), layer.lora_B.data_ptr()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in saved} - parameters == {x.data_ptr()}


def test_a_base_in_evaluation_keeps_its_codes(
    build_nf4_llama: Callable[..., LlamaForCausalLM], logits: Callable[[nn.Module], Tensor]
) -> None:
    """On processors with AVX512-BF16 bitsandbytes stores a layer anew when it is first evaluated; layers without an
    adapter would change their fingerprint, and the adapter would be saved for a base that nobody can load."""
    model = build_nf4_llama()
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",)), seed=0)
    before = fingerprint(model)
    logits(model.eval())
    assert fingerprint(model) == before


def test_a_base_that_was_evaluated_is_refused_or_adapted_right(
    build_nf4_llama: Callable[..., LlamaForCausalLM], logits: Callable[[nn.Module], Tensor]
) -> None:
    """The other layout cannot be dequantised as NF4: logits would be noise."""
    model = build_nf4_llama()
    reference = logits(model)
    logits(model.eval())
    try:
        inject(model, CONFIG, seed=0)
    except TargetError:
        return
    # The layout rounds the block scales to bfloat16: a few times 2⁻⁹ of the logits.
    torch.testing.assert_close(
        logits(model), reference, rtol=0, atol=0.02 * reference.abs().max().item()
    )


def test_what_lora_cannot_adapt_has_no_base_weight() -> None:
    class OwnLinear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Built(nn.Linear):
        def __init__(self, config: dict[str, int]) -> None:
            super().__init__(config["in"], config["out"])

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    foreign = [
        nn.Embedding(4, 4),
        nn.Conv1d(4, 4, 1),
        nn.LayerNorm(4),
        nn.Bilinear(2, 2, 2),
        OwnLinear(4, 4),
        Built({"in": 4, "out": 4}),  # nothing shows what it computes
    ]
    assert [base_weight(module) for module in foreign] == [None] * len(foreign)


def test_a_subclass_that_forms_the_same_product_is_a_linear_layer() -> None:
    """To the bit as the subclass forms it: Falcon adds the bias after the product has been rounded."""

    class Falcon(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            product = input @ self.weight.T
            return product if self.bias is None else product + self.bias

    class Marked(nn.Linear):
        """A subclass that changes nothing."""

    x = torch.randn(5, 64)
    for module in (Falcon(64, 96), Falcon(64, 96, bias=False), Marked(64, 96)):
        weight = base_weight(module)
        assert weight is not None and weight.kind == "dense" and weight.shape == (96, 64)
        with torch.no_grad():
            assert torch.equal(weight.linear(x, module.bias), module(x))


def test_a_projection_that_attention_reads_directly_has_no_base_weight() -> None:
    """nn.MultiheadAttention never calls its output projection, it takes the weight: an update would not be seen."""
    assert base_weight(nn.MultiheadAttention(8, 2).out_proj) is None


@pytest.mark.parametrize(
    ("module", "kind"), [(nn.Linear(64, 96), "dense"), (linear_4bit(), "nf4")], ids=["dense", "nf4"]
)
def test_base_weight_tells_kind_and_shape(module: nn.Module, kind: str) -> None:
    weight = base_weight(module)
    assert weight is not None
    assert (weight.kind, weight.shape) == (kind, (96, 64))
    assert weight.stored is module.weight
    for dtype in DTYPES:
        assert weight.dense(dtype).dtype == dtype and weight.dense(dtype).shape == (96, 64)
