"""Adapters over a base with added tokens: what the adapter supplies need not be in the base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    AdapterError,
    BaseMismatchError,
    Identity,
    LoraConfig,
    inject,
    load_adapter,
    save_adapter,
)

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
OLD = 101
NEW = 108


def resized(build_llama: Build, seed: int, **options: Any) -> LlamaForCausalLM:
    """Return a Llama with seven more tokens, whose rows depend on the seed."""
    model = build_llama(**options)
    torch.manual_seed(seed)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[OLD:] += torch.randn(NEW - OLD, 64)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]], ids=["resized", "trained"])
def test_complete_embeddings_of_peft_load_on_a_resized_base(
    build_llama: Build, logits: Logits, tmp_path: Path, saved: list[str] | None, tied: bool
) -> None:
    build_llama(tied=tied).save_pretrained(tmp_path / "base")
    settings = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": saved}

    def load() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()

    base = resized(load, 1)
    adapted = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.data += 0.1
    adapted.base_model.model.model.layers[1].self_attn.q_proj.lora_B.default.weight.data += 0.1
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model = resized(load, 2)
    load_adapter(model, tmp_path / "adapter")
    assert torch.allclose(logits(model), logits(adapted), atol=1e-5)
    with pytest.raises(AdapterError, match=r"108 rows, but this model has 101.*embeddings\(108\)"):
        load_adapter(load(), tmp_path / "adapter")


def test_supplied_rows_and_modules_are_not_part_of_the_base(
    build_llama: Build, logits: Logits, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=("q_proj",),
        trainable_token_indices={"embed_tokens": tuple(range(OLD, NEW))},
        modules_to_save=("lm_head",),
    )
    trained = resized(build_llama, 1)
    inject(trained, config, seed=0)
    save_adapter(trained, tmp_path, config, Identity())
    model = resized(build_llama, 2)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(trained))
    other = resized(build_llama, 2)
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(BaseMismatchError):
        load_adapter(other, tmp_path)


def test_new_rows_that_no_file_holds_are_part_of_the_base(
    build_llama: Build, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",))
    trained = resized(build_llama, 1)
    inject(trained, config, seed=0)
    save_adapter(trained, tmp_path, config, Identity())
    load_adapter(resized(build_llama, 1), tmp_path)
    with pytest.raises(BaseMismatchError):
        load_adapter(resized(build_llama, 2), tmp_path)
