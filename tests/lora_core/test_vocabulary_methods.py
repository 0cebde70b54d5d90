"""tie_weights and resize_token_embeddings of an adapted model keep its outputs or are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import AdapterError, LoraConfig, inject

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
OF_VOCABULARY: list[dict[str, Any]] = [
    {"target_modules": ("q_proj", "lm_head")},
    {"target_modules": ("q_proj", "embed_tokens")},
    {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",)},
    {"target_modules": ("q_proj",), "modules_to_save": ("embed_tokens", "lm_head")},
    {"target_modules": ("q_proj",), "trainable_token_indices": {"embed_tokens": (3, 4)}},
]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(build_llama: Build, request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return build_llama(tied=request.param)


def adapt(model: nn.Module, **settings: Any) -> None:
    inject(model, LoraConfig(r=4, lora_alpha=8, **settings), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))


@pytest.mark.parametrize("settings", OF_VOCABULARY, ids=str)
def test_tie_weights_changes_nothing(
    model: LlamaForCausalLM,
    logits: Logits,
    settings: dict[str, Any],
) -> None:
    adapt(model, **settings)
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("settings", OF_VOCABULARY, ids=str)
def test_a_resize_of_what_the_adapter_wraps_is_refused(
    model: LlamaForCausalLM,
    refuses: Callable[..., None],
    settings: dict[str, Any],
) -> None:
    adapt(model, **settings)
    refuses(model, lambda: model.resize_token_embeddings(108), AdapterError, "before the adapter")


def test_a_resize_of_plain_embeddings_keeps_the_logits(
    model: LlamaForCausalLM, logits: Logits
) -> None:
    adapt(model, target_modules=("q_proj",))
    before = logits(model)
    model.resize_token_embeddings(108, mean_resizing=False)
    assert torch.equal(logits(model)[..., :101], before)


def test_untied_weights_under_an_adapter_are_reported(build_llama: Build) -> None:
    model = build_llama(tied=True)
    adapt(model, target_modules=("q_proj", "lm_head"))
    model.lm_head.base.weight = nn.Parameter(model.lm_head.base.weight.detach().clone())
    with pytest.raises(AdapterError, match="no longer shares"):
        model.tie_weights()
