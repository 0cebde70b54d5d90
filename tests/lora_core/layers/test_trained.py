"""Rows, whole modules and biases start as the base to the last bit, and what an adapter could not hold is refused."""

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
    """A tied model that multiplies its vectors with √48 ≈ 6.93 inside the embedding, rounded to the dtype: 6.9375 in bfloat16."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = (
        Gemma3ForCausalLM(
            Gemma3TextConfig(vocab_size=V, **sizes, head_dim=12, initializer_range=0.2)
        )
        .to(dtype)
        .eval()
    )
    model.model.embed_tokens.embed_scale = torch.tensor(
        48**0.5
    )  # as loading leaves it: no weight, so not cast
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("model_of", ["gemma", "tied", "untied"])
def test_rows_start_as_the_base_bit_for_bit(
    build_llama: Build, logits: Logits, dtype: torch.dtype, model_of: str
) -> None:
    model = gemma(dtype) if model_of == "gemma" else build_llama(tied=model_of == "tied").to(dtype)
    before = logits(model)
    rows = tuple(range(0, V, 3))
    inject(
        model,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=("q_proj",),
            trainable_token_indices={"embed_tokens": rows},
        ),
        seed=0,
    )
    assert isinstance(model.lm_head, TiedHead) is (model_of != "untied")
    assert torch.equal(logits(model), before)


def test_rows_of_a_base_in_16_bits_are_trained_in_32(build_llama: Build, logits: Logits) -> None:
    """In bfloat16 a step of a thousandth of a weight would be rounded away."""
    model = build_llama(tied=True, dtype=torch.bfloat16)
    inject(
        model,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=("q_proj",),
            trainable_token_indices={"embed_tokens": (3, 7)},
        ),
        seed=0,
    )
    rows = model.model.embed_tokens.trainable_tokens_delta
    before = rows.detach().clone()
    with torch.no_grad():
        for _ in range(1000):
            rows.mul_(1.001)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(
        rows.detach(), before * 1.001**1000, rtol=1e-4, atol=0
    )  # 1000 roundings of 6e-8
    adapted = logits(model).float()
    merge(model)
    # The rows are rounded to bfloat16 once, and so are the logits: some units of 2⁻⁸ of the largest.
    torch.testing.assert_close(
        logits(model).float(), adapted, rtol=0, atol=0.03 * adapted.abs().max().item()
    )


def test_a_tied_head_is_the_product_with_the_whole_weight(build_llama: Build) -> None:
    model = build_llama(tied=True)
    inject(
        model,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=("q_proj",),
            trainable_token_indices={"embed_tokens": (7, 3)},
        ),
        seed=0,
    )
    rows = model.model.embed_tokens
    assert isinstance(rows, TrainedRows)
    with torch.no_grad():
        rows.trainable_tokens_delta.normal_()
    x = torch.randn(2, 5, 64, requires_grad=True)
    wanted = (x, rows.trainable_tokens_delta)
    upstream = torch.randn(2, 5, V)
    found, expected = model.lm_head(x), x @ rows.weight.T
    # Sums of 64 products of about 1 in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found, wanted, upstream),
        torch.autograd.grad(expected, wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ("1",)}, {"modules_to_save": ("2",)}], ids=["itself", "inside"]
)
def test_a_module_with_running_statistics_is_refused(
    settings: dict[str, Any], refuses: Callable[..., None]
) -> None:
    """Training moves them, and neither the file nor a merge would hold them."""
    model = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    )
    config = LoraConfig(r=2, lora_alpha=2, target_modules=("0",), **settings)
    refuses(
        model,
        lambda: inject(model, config, seed=0),
        TargetError,
        "whose running statistics no adapter's file holds",
    )


def test_biases_around_each_other_are_refused(refuses: Callable[..., None]) -> None:
    """BERT's head has a bias of its own and layers with biases inside."""
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
    """As the places of OPT: what is asked for is not what is looked up."""

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
def test_an_embedding_that_does_more_than_look_up_is_refused(
    build: Callable[..., nn.Module], settings: dict[str, Any]
) -> None:
    """An update beside it would be merged into something else than it was added to."""
    modules = {"table": build(11, 8), "fc": nn.Linear(8, 8)}
    model = nn.ModuleDict(modules)
    with pytest.raises(TargetError, match=r"table is a .* which does not just look vectors up"):
        inject(model, LoraConfig(r=2, lora_alpha=2, **settings), seed=0)
    assert dict(model.items()) == modules
