"""Modules that are trained or copied in full have PEFT's names and tensors, in files both ways."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPTJConfig, GPTJForCausalLM, RobertaConfig, RobertaForMaskedLM

from lora_core import AdapterError, Identity, LoraConfig, inject, load_adapter, save_adapter
from lora_core.adapter.json_files import WEIGHTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
TOKENS = torch.arange(3, 9)[None]


def roberta() -> nn.Module:
    """Return an encoder whose head has its bias under two names."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32}
    config = RobertaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    return RobertaForMaskedLM(config)


def gptj() -> nn.Module:
    """Return a decoder whose output head has a bias."""
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    model = GPTJForCausalLM(GPTJConfig(bos_token_id=1, eos_token_id=2, **sizes))
    nn.init.normal_(model.lm_head.bias)
    return model


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    saved: tuple[str, ...] = ()


CASES = {
    "ending": Case(roberta, ("query",), ("Norm",)),
    "tied bias": Case(roberta, ("query",), ("lm_head",)),
    "head with a bias": Case(gptj, ("q_proj", "lm_head")),
}


def seeded(case: Case) -> Any:
    torch.manual_seed(3)
    return case.build().eval()


@torch.no_grad()
def train(model: nn.Module) -> list[torch.Size]:
    """Change what is trained by random values; return the sorted shapes of these tensors."""
    trained = [one for one in model.parameters() if one.requires_grad]
    for parameter in trained:
        parameter += 0.1 * torch.randn(parameter.shape)
    return sorted(one.shape for one in trained)


def logits(model: Any) -> Tensor:
    output: Tensor = model(input_ids=TOKENS).logits
    return output


def close(found: Tensor, expected: Tensor) -> None:
    """Compare sums of at most 64 products in float32."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_both_libraries_train_the_same_and_read_the_other_file(case: Case, tmp_path: Path) -> None:
    settings = {"target_modules": case.targets, "modules_to_save": case.saved}
    config = LoraConfig(r=2, lora_alpha=4, **settings)
    ours = seeded(case)
    inject(ours, config, seed=0)
    names = {name: list(value) or None for name, value in settings.items()}
    theirs = get_peft_model(seeded(case), PeftConfig(r=2, lora_alpha=4, **names)).eval()
    assert train(ours) == train(theirs)
    save_adapter(ours, tmp_path / "ours", config, Identity())
    theirs.save_pretrained(tmp_path / "theirs")
    close(logits(PeftModel.from_pretrained(seeded(case), tmp_path / "ours")), logits(ours))
    for folder, expected in (("ours", logits(ours)), ("theirs", logits(theirs))):
        loaded = seeded(case)
        load_adapter(loaded, tmp_path / folder)
        close(logits(loaded), expected)


@pytest.mark.parametrize(
    ("case", "key", "message"),
    [
        ("head with a bias", "lm_head.base_layer.bias", "base bias of lm_head that differs"),
        ("tied bias", "lm_head.decoder.bias", r"different values for .*lm_head\.decoder\.bias"),
    ],
)
def test_copy_that_differs_is_refused(case: str, key: str, message: str, tmp_path: Path) -> None:
    one = CASES[case]
    names = {"target_modules": list(one.targets), "modules_to_save": list(one.saved) or None}
    model = get_peft_model(seeded(one), PeftConfig(r=2, lora_alpha=4, **names))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[f"base_model.model.{key}"] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        load_adapter(seeded(one), tmp_path)
