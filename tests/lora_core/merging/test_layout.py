"""A checkpoint with `Linear` and `Conv1D` is merged on disk as in memory, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

from lora_core import (
    Identity,
    LoraConfig,
    MergeError,
    inject,
    load_adapter,
    merge,
    merge_checkpoint,
    save_adapter,
)
from lora_core.adapter.json_files import IDENTITY, TRANSPOSED

GPT2: dict[str, Any] = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 16,
    "initializer_range": 0.2,
}


def bert_gpt2() -> PreTrainedModel:
    encoder = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    decoder = GPT2Config(**GPT2, add_cross_attention=True, is_decoder=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return EncoderDecoderModel(config)


def gpt2_classifier() -> PreTrainedModel:
    """Return a model whose head is a square `Linear` among `Conv1D`."""
    return GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=16))


CASES = {
    "BERT and GPT-2, square Linear": (bert_gpt2, ("query",)),
    "BERT and GPT-2, square Conv1D": (bert_gpt2, ("q_attn", "c_proj")),
    "BERT and GPT-2, both": (bert_gpt2, ("query", "dense", "c_attn", "q_attn", "c_proj")),
    "GPT-2 and its score": (gpt2_classifier, ("score", "c_proj")),
}
each_case = pytest.mark.parametrize(("make", "targets"), CASES.values(), ids=CASES.keys())
Make = Callable[[], PreTrainedModel]


def build(make: Make) -> PreTrainedModel:
    torch.manual_seed(0)
    return make().eval()


def train(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)


def assert_merged_as_in_memory(make: Make, adapter: Path, folder: Path) -> None:
    build(make).save_pretrained(folder / "base")
    model = build(make)
    load_adapter(model, adapter)
    merge(model)
    model.save_pretrained(folder / "expected")
    merge_checkpoint(folder / "base", adapter, folder / "found")
    expected = load_file(folder / "expected" / "model.safetensors")
    found = load_file(folder / "found" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@each_case
def test_own_adapter_records_the_layout(
    make: Make, targets: tuple[str, ...], tmp_path: Path
) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    model = build(make)
    inject(model, config, seed=0)
    train(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    assert_merged_as_in_memory(make, tmp_path / "adapter", tmp_path)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a deprecated name
@each_case
def test_names_decide_for_an_adapter_without_a_record(
    make: Make, targets: tuple[str, ...], tmp_path: Path
) -> None:
    theirs = get_peft_model(build(make), PeftConfig(r=2, target_modules=list(targets)))
    train(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    assert_merged_as_in_memory(make, tmp_path / "adapter", tmp_path)


def test_unknown_layout_of_a_square_weight_is_refused(tmp_path: Path) -> None:
    """The flag is set, and no module has a name that explains it."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.bias = nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    model = nn.ModuleDict({"mix": Conv1D()})
    config = LoraConfig(r=2, lora_alpha=4, target_modules=("mix",))
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    save_file(weights, base / "model.safetensors")
    inject(model, config, seed=0)
    train(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "found")
    found = load_file(tmp_path / "found" / "model.safetensors")
    merge(model)
    assert torch.equal(found["mix.weight"], model.state_dict()["mix.weight"])
    sidecar = tmp_path / "adapter" / IDENTITY
    values = json.loads(sidecar.read_text())
    assert values.pop(TRANSPOSED) == ["mix"]
    sidecar.write_text(json.dumps(values))
    with pytest.raises(MergeError, match="square weight of mix"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "again")
    assert not (tmp_path / "again").exists()
