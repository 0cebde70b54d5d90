"""Under autocast an adapter is its base at step 0, agrees with PEFT, and keeps its gradients' dtypes; without, no bit changes.

On the CPU autocast multiplies in bfloat16, whose unit roundoff is 2⁻⁹ ≈ 0.002.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
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
from lora_core.layers.functional import lora_linear
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
    "turned": lambda: Conv1D(OUT, IN),
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
    """Return a layer, and a copy of it that is adapted and still at step 0."""
    torch.manual_seed(3)
    base = build()
    model = nn.ModuleDict({"fc": copy.deepcopy(base)})
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=("fc",), **settings), seed=0)
    return base, model["fc"]


def inputs(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    base = getattr(layer, "base", layer)
    if isinstance(base, nn.Embedding):
        return torch.randint(0, V, (2, 9))
    return torch.randn(*((2, 8, 6, 6) if isinstance(base, nn.Conv2d) else (2, 9, IN)), dtype=dtype)


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
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
def test_what_is_computed_is_that_of_float32_rounded(
    build: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    """Inputs, factors and the sum are rounded to bfloat16: a few roundoffs of the largest terms; int8 rounds inputs as well."""
    if "bias" in settings and getattr(build(), "bias", None) is None:
        pytest.skip("there is no bias to train")
    base, layer = built(build, **settings)
    exact = copy.deepcopy(shake(layer)).float()
    x = inputs(layer)
    with autocast():
        assert layer(x).dtype == base(x).dtype
    found, reference = results(layer, x, autocast()), results(exact, x, nullcontext())
    assert (found[0] - reference[0]).abs().max() < 0.03 * reference[0].abs().max()
    for gradient, expected in zip(found[1:], reference[1:], strict=True):
        assert (gradient - expected).norm() < 0.02 * expected.norm()


def results(layer: nn.Module, x: Tensor, around: AbstractContextManager[None]) -> list[Tensor]:
    """Return what a layer answers and its gradients of x, where it has one, and of what is trained, all in float32."""
    x = x.clone().requires_grad_(x.is_floating_point())
    wanted = [
        *([x] if x.requires_grad else []),
        *(p for p in layer.parameters() if p.requires_grad),
    ]
    with around:
        y = layer(x)
    gradients = torch.autograd.grad(
        y, wanted, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    )
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in wanted]
    return [y.detach().float(), *(gradient.float() for gradient in gradients)]


@each_layer
def test_a_backward_pass_inside_is_the_one_outside(build: Callable[[], nn.Module]) -> None:
    layer = shake(built(build)[1])
    x = inputs(layer)
    with autocast():
        inside = results(layer, x, nullcontext())
    outside = results(layer, x, autocast())
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))


def plain(
    x: Tensor, layer: nn.Linear, factors: tuple[Tensor, Tensor, float], upstream: Tensor
) -> list[Tensor]:
    """Return the product and its gradients step by step as they are formed where no dtype is ever chosen by autocast."""
    a, b, scale = factors
    y = F.linear(x, layer.weight, layer.bias)
    y.addmm_(x @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=scale)
    down = (upstream @ b.to(x.dtype)) * scale
    grad_x = upstream @ layer.weight
    grad_x.addmm_(down, a.to(x.dtype))
    return [
        y,
        grad_x,
        (down.T @ x).to(a.dtype),
        (upstream.T @ ((x @ a.to(x.dtype).T) * scale)).to(b.dtype),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_autocast_no_bit_depends_on_it(dtype: torch.dtype) -> None:
    layer = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    x, upstream = (
        torch.randn(7, IN, dtype=dtype, requires_grad=True),
        torch.randn(7, OUT, dtype=dtype),
    )
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((4, IN), (OUT, 4)))
    y = lora_linear(x, DenseWeight(layer), layer.bias, (a, b, 1.7))
    found = [y, *torch.autograd.grad(y, (x, a, b), upstream)]
    expected = plain(x.detach(), layer, (a.detach(), b.detach(), 1.7), upstream)
    assert all(
        torch.equal(one, other) and one.dtype == other.dtype
        for one, other in zip(found, expected, strict=True)
    )


def test_q_k_v_keep_one_x_as_it_came() -> None:
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


def test_a_checkpointed_block_gives_the_same_gradients() -> None:
    layer = shake(built(LAYERS["dense"])[1])
    x = inputs(layer)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    assert all(
        torch.equal(*pair)
        for pair in zip(
            results(layer, x, autocast()), results(Checkpointed(), x, autocast()), strict=True
        )
    )


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


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 12, 3),
            nn.Linear(12, 5),
        )

    def forward(self, input_ids: Tensor) -> Any:
        pictures = F.one_hot(input_ids, 12)[:, None].float().expand(-1, 3, -1, -1)
        return type(
            "Output",
            (),
            {
                "logits": self.head(
                    torch.tanh(self.second(torch.tanh(self.first(pictures)))).mean(dim=(2, 3))
                )
            },
        )


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
    "whole": case(llama, "q_proj", modules_to_save=("lm_head",)),
    "rows": case(llama, "q_proj", trainable_token_indices={"embed_tokens": (3, 7)}),
    "experts": case(
        mixtral, "q_proj", target_parameters=("experts.gate_up_proj", "experts.down_proj")
    ),
    "conv": case(Pictures, "first", "second"),
    "conv dora": case(Pictures, "first", "second", use_dora=True),
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
def test_a_model_computes_what_pefts_does(
    build: Callable[[], nn.Module], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Both are rounded in other places, so both are measured from float32: ours lies no further from it than PEFT's."""
    config = LoraConfig(**settings)
    model = base(build)
    inject(model, config, seed=1)
    shake(model)
    save_adapter(model, tmp_path, config, Identity())
    theirs = PeftModel.from_pretrained(base(build), tmp_path, is_trainable=True).eval()
    exact = logits(model)
    with autocast():
        ours, peft = logits(model), logits(theirs)
    assert ours.dtype == peft.dtype
    error, other = ((each.float() - exact).norm() / exact.norm() for each in (ours, peft))
    assert error < 1.25 * other and 1e-4 < other < 0.1
    gradients = [
        dict(gradients_of(each, parameters))
        for each, parameters in ((ours, trained(model)), (peft, trained(theirs)))
    ]
    reference = dict(gradients_of(exact, trained(model)))
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float32
        error, other = (
            (each[name].view_as(gradient) - reference[name]).norm() / reference[name].norm()
            for each in gradients
        )
        assert error < 1.25 * other + 0.01, name


def gradients_of(y: Tensor, parameters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    found = torch.autograd.grad((y.float() ** 2).mean(), list(parameters.values()))
    yield from zip(parameters, found, strict=True)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return what is trained under the keys of the file, in either library."""
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
def test_a_merge_under_autocast_is_a_merge(
    build: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    if "lora_bias" in settings:
        pytest.skip("a layer without a bias takes none")
    models = [base(build) for _ in range(2)]
    for model in models:
        inject(model, LoraConfig(**settings), seed=1)
        shake(model)
    merge(models[0])
    with autocast():
        merge(models[1])
    assert all(
        torch.equal(value, models[1].state_dict()[name])
        for name, value in models[0].state_dict().items()
    )
