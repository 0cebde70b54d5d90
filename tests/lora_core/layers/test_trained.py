"""Trained rows, modules and biases equal the base at step 0; unsupported modules are refused."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
)

from lora_core import LoraConfig, TargetError, inject, merge
from lora_core.layers.trained import TiedHead, TrainedRows

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
V = 101


def gemma(dtype: torch.dtype) -> nn.Module:
    """Return a tied model that multiplies its vectors by √48 ≈ 6.93 inside the embedding.

    The factor is rounded to the dtype: 6.9375 in bfloat16.
    """
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = Gemma3TextConfig(vocab_size=V, **sizes, head_dim=12, initializer_range=0.2)
    model = Gemma3ForCausalLM(config).to(dtype).eval()
    # As after loading: the factor is not a weight, so it is not cast.
    model.model.embed_tokens.embed_scale = torch.tensor(48**0.5)
    return model


def inject_rows(model: nn.Module, *rows: int) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=("q_proj",),
        trainable_token_indices={"embed_tokens": rows},
    )
    inject(model, config, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("model_of", ["gemma", "tied", "untied"])
def test_step_zero_with_trained_rows_is_the_base_bit_for_bit(
    build_llama: Build, logits: Logits, dtype: torch.dtype, model_of: str
) -> None:
    model = gemma(dtype) if model_of == "gemma" else build_llama(tied=model_of == "tied").to(dtype)
    before = logits(model)
    inject_rows(model, *range(0, V, 3))
    assert isinstance(model.lm_head, TiedHead) is (model_of != "untied")
    assert torch.equal(logits(model), before)


def test_rows_of_a_16_bit_base_are_trained_in_float32(build_llama: Build, logits: Logits) -> None:
    """In bfloat16 a step of 0.1 % of a weight would be rounded away."""
    model = build_llama(tied=True, dtype=torch.bfloat16)
    inject_rows(model, 3, 7)
    rows = model.model.embed_tokens.trainable_tokens_delta
    before = rows.detach().clone()
    with torch.no_grad():
        for _ in range(1000):
            rows.mul_(1.001)
    assert rows.dtype == torch.float32
    # 1000 roundings of 6e-8.
    torch.testing.assert_close(rows.detach(), before * 1.001**1000, rtol=1e-4, atol=0)
    adapted = logits(model).float()
    merge(model)
    # Rows and logits are rounded to bfloat16 once: a few units of 2⁻⁸ of the largest value.
    tolerance = 0.03 * adapted.abs().max().item()
    torch.testing.assert_close(logits(model).float(), adapted, rtol=0, atol=tolerance)


def test_tied_head_is_the_product_with_the_full_weight(build_llama: Build) -> None:
    model = build_llama(tied=True)
    inject_rows(model, 7, 3)
    rows = model.model.embed_tokens
    assert isinstance(rows, TrainedRows)
    with torch.no_grad():
        rows.trainable_tokens_delta.normal_()
    x = torch.randn(2, 5, 64, requires_grad=True)
    inputs = (x, rows.trainable_tokens_delta)
    upstream = torch.randn(2, 5, V)
    found = model.lm_head(x)
    expected = x @ rows.weight.T
    # Sums of 64 products of about 1 in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found, inputs, upstream)
    references = torch.autograd.grad(expected, inputs, upstream)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ("1",)}, {"modules_to_save": ("2",)}], ids=["itself", "inside"]
)
def test_module_with_running_statistics_is_refused(
    settings: dict[str, Any], refuses: Callable[..., None]
) -> None:
    """Training updates them, and neither the file nor a merge would store them."""
    model = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    )
    config = LoraConfig(r=2, lora_alpha=2, target_modules=("0",), **settings)
    refuses(
        model,
        lambda: inject(model, config, seed=0),
        TargetError,
        "whose running statistics no adapter file stores",
    )


@pytest.mark.parametrize(
    "container",
    [
        nn.ModuleList([nn.Linear(4, 4)]),
        nn.ModuleDict({"a": nn.Linear(4, 4)}),
        nn.ParameterList([torch.ones(4)]),
        nn.ParameterDict({"a": torch.ones(4)}),
    ],
    ids=lambda container: type(container).__name__,
)
def test_container_that_is_not_called_is_refused(
    container: nn.Module, refuses: Callable[..., None]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), container)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=("0",), modules_to_save=("1",))
    message = f"names 1, a {type(container).__name__}, which the model indexes"
    refuses(model, lambda: inject(model, config, seed=0), TargetError, message)


def test_nested_biases_are_refused(refuses: Callable[..., None]) -> None:
    """BERT's head has a bias and contains layers with biases."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    model = BertForMaskedLM(BertConfig(vocab_size=V, **sizes, max_position_embeddings=32))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=("query",), bias="all")
    refuses(
        model,
        lambda: inject(model, config, seed=0),
        TargetError,
        "bias of cls.predictions around cls.predictions.transform.dense",
    )


class Offset(nn.Embedding):
    """Like OPT's position embedding: it looks up other rows than it is given."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


EMBEDDINGS = {
    "offset": Offset,
    "normed": bnb.nn.StableEmbedding,
    "int8": lambda *sizes: bnb.nn.Embedding8bit(*sizes).to("cpu"),
}
SETTINGS = {
    "update": {"target_modules": ("fc", "table")},
    "rows": {"target_modules": ("fc",), "trainable_token_indices": {"table": (3,)}},
}


@pytest.mark.parametrize("build", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_embedding_that_does_more_than_look_up_is_refused(
    build: Callable[..., nn.Module], settings: dict[str, Any]
) -> None:
    """A merge would change something else than the forward pass does."""
    modules = {"table": build(11, 8), "fc": nn.Linear(8, 8)}
    model = nn.ModuleDict(modules)
    with pytest.raises(TargetError, match=r"table is a .* which does not just look vectors up"):
        inject(model, LoraConfig(r=2, lora_alpha=2, **settings), seed=0)
    assert dict(model.items()) == modules
