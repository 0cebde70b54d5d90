"""LoftQ initialization brings a quantized model closest to its full-precision weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lora_core import ConfigError, LoraConfig, TargetError, inject, lora_layers

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
Build = Callable[..., LlamaForCausalLM]
Load = Callable[[str], LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]


@pytest.fixture
def logit_error(llama_folder: Path, logits: Logits) -> Callable[[nn.Module], float]:
    """Return a function that measures the distance to the logits of the full-precision model."""
    expected = logits(AutoModelForCausalLM.from_pretrained(llama_folder).eval())

    def measure(model: nn.Module) -> float:
        return (logits(model) - expected).norm().item()

    return measure


def config(init: str = "loftq", **fields: Any) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": (Q, DOWN), "init_lora_weights": init}
    return LoraConfig(**{**defaults, **fields})


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_remaining_error_is_tail_of_singular_values(
    quantized: Load, originals: dict[str, Tensor], kind: str, use_rslora: bool
) -> None:
    """‖W − (Q + s·B·A)‖ equals the error of the best approximation of W − Q (Eckart and Young)."""
    relative_errors: dict[str, list[float]] = {Q: [], DOWN: []}
    for rank in (1, 8, 32):
        model = quantized(kind)
        inject(model, config(r=rank, use_rslora=use_rslora), seed=0, original=originals)
        for name, layer in lora_layers(model):
            error = originals[name].double() - layer.frozen.dense(torch.float32).double()
            values = torch.linalg.svdvals(error)
            remaining = (error - layer.delta().double()).norm()
            # The factors are rounded to float32: 6e-8 of a product as large as the error itself.
            assert remaining.item() == pytest.approx(values[rank:].norm().item(), rel=1e-5)
            relative_errors[name].append((remaining / values.norm()).item())
    first, _, last = relative_errors[Q]
    assert relative_errors[Q] == sorted(relative_errors[Q], reverse=True)
    assert 0.9 < first < 1
    assert last < 0.6


@pytest.mark.parametrize(
    ("kind", "fields", "remaining"),
    [
        ("nf4", {"r": 16}, 0.7),
        ("nf4", {"r": 16, "use_dora": True}, 0.7),
        ("fp4", {"r": 16}, 0.7),
        ("int8", {"r": 32}, 0.9),
    ],
)
def test_logits_are_closer_to_full_precision_model(
    quantized: Load,
    originals: dict[str, Tensor],
    logit_error: Callable[[nn.Module], float],
    kind: str,
    fields: dict[str, Any],
    remaining: float,
) -> None:
    """Measured: 0.55, 0.55 and 0.8. With int8, the error of quantized inputs remains."""
    model = quantized(kind).train(kind != "int8")
    before = logit_error(model)
    every = config(target_modules="all-linear", **fields)
    inject(model, every, seed=0, original=originals.__getitem__)
    assert logit_error(model) < remaining * before
    assert len(list(lora_layers(model))) == 14


def test_originals_are_loaded_one_at_a_time(quantized: Load, originals: dict[str, Tensor]) -> None:
    loaded = []

    def load(name: str) -> Tensor:
        loaded.append(name)
        return originals[name]

    inject(quantized("nf4"), config(), seed=0, original=load)
    assert loaded == [Q, DOWN]


def test_dense_layer_gets_default_initialization(
    build_nf4_llama: Build, originals: dict[str, Tensor]
) -> None:
    model = build_nf4_llama()
    default = build_nf4_llama()
    targets = ("lm_head", "q_proj")
    inject(model, config(target_modules=targets), seed=1, original=originals)
    inject(default, config("kaiming", target_modules=targets), seed=1)
    layers = dict(lora_layers(model))
    expected = dict(lora_layers(default))["lm_head"]
    assert torch.equal(layers["lm_head"].lora_A, expected.lora_A)
    assert not layers["lm_head"].lora_B.any()
    assert layers[Q].lora_B.any()


def test_dense_model_raises(
    build_llama: Build, originals: dict[str, Tensor], refuses: Callable[..., None]
) -> None:
    model = build_llama()
    refuses(
        model,
        lambda: inject(model, config(), seed=0, original=originals),
        TargetError,
        "'loftq' has no effect: no target is quantized",
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda weight: None, TargetError, f"no original weight is given for {DOWN}"),
        (
            lambda weight: weight.T,
            ConfigError,
            rf"the original of {DOWN} is \(128, 64\) and its layer \(64, 128\)",
        ),
        (lambda weight: weight * torch.nan, ConfigError, "must be a matrix of finite values"),
    ],
    ids=["missing", "transposed", "not finite"],
)
def test_invalid_original_raises_and_leaves_model_unchanged(
    build_nf4_llama: Build,
    originals: dict[str, Tensor],
    refuses: Callable[..., None],
    change: Callable[[Tensor], Tensor | None],
    error: type[Exception],
    message: str,
) -> None:
    model = build_nf4_llama()
    changed = change(originals.pop(DOWN))
    if changed is not None:
        originals[DOWN] = changed
    refuses(model, lambda: inject(model, config(), seed=0, original=originals), error, message)
