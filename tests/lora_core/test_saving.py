"""An adapted model is not saved as if it were plain, and wrappers are told from modules."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from lora_core import (
    AdapterError,
    Bank,
    Identity,
    LoraConfig,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from lora_core.modules import adapter_parts, unwrapped

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj",))


def test_save_pretrained_of_an_adapted_model_names_the_right_call(
    build_llama: Build, tmp_path: Path
) -> None:
    model = build_llama()
    inject(model, CONFIG, seed=0)
    for one in (model, model.model, deepcopy(model)):
        with pytest.raises(AdapterError, match=r"lora_core\.save_adapter"):
            one.save_pretrained(tmp_path / "saved")
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "trainer"), report_to=[]))
    with pytest.raises(AdapterError, match=r"lora_core\.save_adapter"):
        trainer.save_model(str(tmp_path / "saved"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_merged_model_is_saved_until_it_is_unmerged(build_llama: Build, tmp_path: Path) -> None:
    model = build_llama()
    inject(model, CONFIG, seed=0)
    merged = merge(model)
    model.save_pretrained(tmp_path / "merged")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    unmerge(model, merged)
    with pytest.raises(AdapterError):
        model.save_pretrained(tmp_path / "unmerged")


def test_bank_saves_only_the_bare_base(build_llama: Build, tmp_path: Path) -> None:
    model = build_llama()
    bank = Bank(model)
    bank.add("a", CONFIG, seed=0)
    model.save_pretrained(tmp_path / "base")
    with bank.using("a"), pytest.raises(AdapterError):
        model.save_pretrained(tmp_path / "adapted")


def test_state_restores_an_adapted_model_and_is_refused_by_a_plain_one(
    build_llama: Build, logits: Logits, randomize: Callable[[nn.Module], None]
) -> None:
    base = build_llama()
    model = build_llama()
    inject(model, CONFIG, seed=0)
    randomize(model)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        base.load_state_dict(state)
    again = build_llama(seed=5)
    inject(again, CONFIG, seed=1)
    again.load_state_dict(state)
    assert torch.equal(logits(again), logits(model))


class Root(nn.Module):
    """A model whose only child has the name that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_child_called_module_is_a_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Root()
    base = deepcopy(model)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=("0",))
    inject(model, config, seed=0)
    assert [name for name, _ in adapter_parts(model)] == ["module.0"]
    model.module[0].lora_B.data.normal_()
    save_adapter(model, tmp_path / "adapter", config, Identity())
    load_adapter(base, tmp_path / "adapter")
    x = torch.randn(3, 8)
    assert torch.equal(base(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile imports torch.jit
def test_wrappers_are_still_removed() -> None:
    model = Root()
    assert unwrapped(model) is model
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(torch.optim.swa_utils.AveragedModel(model)).module[0].in_features == 8
    assert unwrapped(torch.compile(model)) is model  # type: ignore[arg-type]
    assert unwrapped(torch.compile(nn.DataParallel(model))) is model  # type: ignore[arg-type]


def test_parts_have_the_attributes_of_their_bases() -> None:
    model = nn.ModuleDict(
        {"l": nn.Linear(8, 6), "e": nn.Embedding(9, 8, padding_idx=0), "c": nn.Conv2d(2, 4, 3)}
    )
    inject(model, LoraConfig(r=2, lora_alpha=2, target_modules=("l", "e", "c")), seed=0)
    assert (model["l"].in_features, model["l"].out_features) == (8, 6)
    assert (model["e"].num_embeddings, model["e"].embedding_dim) == (9, 8)
    assert model["e"].padding_idx == 0
    assert (model["c"].in_channels, model["c"].kernel_size) == (2, (3, 3))
    assert not hasattr(model["l"], "_hf_hook")
    with pytest.raises(AttributeError, match="LoraLinear has no attribute 'absent'"):
        _ = model["l"].absent
