"""A base that is not a causal language model is refused by name before anything is loaded."""

from collections.abc import Callable

import pytest
from families.configs import tiny_config
from transformers import AutoConfig, PreTrainedModel

from lora_core import LoraConfig, inject
from lora_core.modules import modules_outside_language_model
from pipelines.errors import BaseModelError
from pipelines.models.support import (
    check_checkpointing,
    check_supported,
    context_tokens,
    text_body,
    why_not_packed,
)


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "xlm-roberta", "electra", "bert-generation", "xlnet"]
)
def test_encoders_are_refused(name: str) -> None:
    message = f"family '{name}' is an encoder, .* take a decoder-only base"
    with pytest.raises(BaseModelError, match=message):
        check_supported(tiny_config(name))


@pytest.mark.parametrize("name", ["bart", "mbart", "pegasus", "whisper", "marian", "blenderbot"])
def test_encoder_decoders_are_refused(name: str) -> None:
    message = f"family '{name}' is an encoder-decoder, .* take a decoder-only base"
    with pytest.raises(BaseModelError, match=message):
        check_supported(tiny_config(name))


@pytest.mark.parametrize("name", ["t5", "qwen2_vl", "llava", "vit"])
def test_families_without_a_causal_class_are_refused(name: str) -> None:
    kinds = {"t5": "an encoder-decoder", "vit": "not a causal language model"}
    kind = kinds.get(name, "a vision-language model")
    with pytest.raises(BaseModelError, match=f"family '{name}' is {kind}"):
        check_supported(AutoConfig.for_model(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba2", "gemma3"])
def test_causal_language_models_are_accepted(name: str) -> None:
    check_supported(tiny_config(name))


def test_the_reason_why_a_family_is_not_packed(family: Callable[..., PreTrainedModel]) -> None:
    reasons = {
        name: why_not_packed(family(name))
        for name in ("llama", "bloom", "mamba2", "qwen3_next", "gemma3")
    }
    assert reasons == {
        "llama": None,
        "gemma3": None,  # its vision tower does not matter
        "bloom": "bloom does not attend through transformers' attention interface",
        "mamba2": "mamba2 carries a recurrent state from token to token",
        "qwen3_next": "qwen3_next carries a recurrent state from token to token",
    }


def test_gradient_checkpointing_is_refused_for_a_family_that_lacks_it(
    family: Callable[..., PreTrainedModel],
) -> None:
    check_checkpointing(family("llama"))
    message = "gradient_checkpointing is true, .* family 'openai-gpt' does not support it"
    with pytest.raises(BaseModelError, match=message):
        check_checkpointing(family("openai-gpt"))


def test_only_the_language_model_of_a_wrapper_is_read_and_adapted(
    family: Callable[..., PreTrainedModel],
) -> None:
    model = family("gemma3")
    assert text_body(model) is model.model.language_model
    assert set(modules_outside_language_model(model)) == {
        "model.vision_tower",
        "model.multi_modal_projector",
    }
    targets = inject(model, LoraConfig(r=2, lora_alpha=4), seed=0)
    assert targets and all(
        target.name.startswith("model.language_model.layers.") for target in targets
    )
    assert modules_outside_language_model(family("llama")) == {}


def test_the_context_is_the_language_models(family: Callable[..., PreTrainedModel]) -> None:
    assert context_tokens(family("gemma3").config) == context_tokens(family("llama").config) == 256
