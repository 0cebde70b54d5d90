"""Under autocast an adapter equals its base at step 0, agrees with PEFT and keeps gradient dtypes.

Without autocast no bit changes.

On the CPU autocast multiplies in bfloat16, whose unit roundoff is 2⁻⁹ ≈ 0.002.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_core import Identity, LoraConfig, inject, merge, save_adapter
from lora_core.adapter.io import tensors_of
from lora_core.base.quant import DenseWeight, disable_cpu_repacking
from lora_core.layers.functional import ScaledFactors, lora_linear
from lora_core.modules import adapter_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:There are multiple adapter keys:UserWarning"),
]
IN, OUT, V = 64, 96, 101
SIZES = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


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


@torch.no_grad()
def add_noise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


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


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.2))


def mixtral() -> nn.Module:
    config = MixtralConfig(
        **SIZES,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config)


class ImageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(12, 5)

    def forward(self, input_ids: Tensor) -> Any:
        images = F.one_hot(input_ids, 12)[:, None].float().expand(-1, 3, -1, -1)
        features = torch.tanh(self.second(torch.tanh(self.first(images))))
        return SimpleNamespace(logits=self.head(features.mean(dim=(2, 3))))


def case(
    build: Callable[[], nn.Module], *targets: str, **settings: Any
) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    return build, {"r": 4, "lora_alpha": 8, "target_modules": targets, **settings}


CASES = {
    "plain": case(llama, "q_proj", "up_proj", "down_proj"),
    "dora": case(llama, "q_proj", "up_proj", use_dora=True),
    "lora_bias": case(llama, "q_proj", lora_bias=True),
    "embedding": case(llama, "embed_tokens", "q_proj"),
    "dora embedding": case(llama, "embed_tokens", use_dora=True),
    "full module": case(llama, "q_proj", modules_to_save=("lm_head",)),
    "rows": case(llama, "q_proj", trainable_token_indices={"embed_tokens": (3, 7)}),
    "experts": case(
        mixtral, "q_proj", target_parameters=("experts.gate_up_proj", "experts.down_proj")
    ),
    "conv": case(ImageModel, "first", "second"),
    "conv dora": case(ImageModel, "first", "second", use_dora=True),
}


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 12, (2, 9), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids).logits


def base(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return build().eval()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape:UserWarning")
@pytest.mark.parametrize(("build", "settings"), CASES.values(), ids=CASES.keys())
def test_adapted_model_agrees_with_peft(
    build: Callable[[], nn.Module], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Ours is no further from the float32 result than PEFT's.

    The two round at different places, so both are compared with float32.
    """
    config = LoraConfig(**settings)
    model = base(build)
    inject(model, config, seed=1)
    add_noise(model)
    save_adapter(model, tmp_path, config, Identity())
    theirs = PeftModel.from_pretrained(base(build), tmp_path, is_trainable=True).eval()
    exact = logits(model)
    with autocast():
        ours = logits(model)
        peft = logits(theirs)
    assert ours.dtype == peft.dtype
    peft_error = relative_error(peft, exact)
    assert 1e-4 < peft_error < 0.1
    assert relative_error(ours, exact) < 1.25 * peft_error
    our_gradients = gradients_of(ours, trained(model))
    peft_gradients = gradients_of(peft, trained(theirs))
    references = gradients_of(exact, trained(model))
    for name, gradient in our_gradients.items():
        assert gradient.dtype == torch.float32
        peft_error = relative_error(peft_gradients[name].view_as(gradient), references[name])
        assert relative_error(gradient, references[name]) < 1.25 * peft_error + 0.01, name


def relative_error(found: Tensor, exact: Tensor) -> Tensor:
    return (found.float() - exact).norm() / exact.norm()


def gradients_of(y: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad((y.float() ** 2).mean(), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters under the keys of the file, for either library."""
    if not isinstance(model, PeftModel):
        return {
            key.removesuffix(".weight"): p
            for key, p in tensors_of(dict(adapter_parts(model))).items()
        }
    named = {
        name.replace(".default", "").replace(".modules_to_save", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {key.removesuffix(".weight"): parameter for key, parameter in named.items()}


@pytest.mark.parametrize(("build", "settings"), CASES.values(), ids=CASES.keys())
def test_merge_under_autocast_equals_merge_without(
    build: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    if "lora_bias" in settings:
        pytest.skip("lora_bias cannot be merged into a layer without a bias")
    models = [base(build) for _ in range(2)]
    for model in models:
        inject(model, LoraConfig(**settings), seed=1)
        add_noise(model)
    merge(models[0])
    with autocast():
        merge(models[1])
    expected = models[0].state_dict()
    found = models[1].state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
