"""A merge on disk into a tied head or embedding equals a merge in memory followed by a save."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tied_checkpoints import CASES, bert, classifier, t5, tensors, untied_neox, values
from trained_noise import add_noise
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel

from lora_core import (
    Identity,
    LoraConfig,
    MergeError,
    inject,
    merge,
    merge_checkpoint,
    save_adapter,
)

FLAG = "tie_word_embeddings"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Prepare = Callable[..., PreTrainedModel]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """Save a base and an adapter and return the adapted model."""

    def make(
        build: Callable[[], PreTrainedModel],
        targets: tuple[str, ...],
        *,
        shard: str = "1GB",
        dtype: Any = torch.float32,
    ) -> Any:
        torch.manual_seed(0)
        model = build().to(dtype).eval()
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        model.save_pretrained(tmp_path / "base", max_shard_size=shard)
        inject(model, config, seed=0)
        add_noise(model)
        save_adapter(model, tmp_path / "adapter", config, Identity(base="tiny"))
        return model

    return make


def edit(path: Path, *, without: str | None = None, **changes: Any) -> None:
    found = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    found.pop(without or "", None)
    path.write_text(json.dumps(found), encoding="utf-8")


def assert_same_files(model: PreTrainedModel, tmp_path: Path, *, check_base: bool = True) -> None:
    """Compare a merge on disk with a merge in memory and a save: tensors and the tie flag."""
    merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", check_base=check_base
    )
    merge(model)
    model.save_pretrained(tmp_path / "expected")
    found = tensors(tmp_path / "merged")
    expected = tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    assert values(tmp_path / "merged")[FLAG] == values(tmp_path / "expected")[FLAG]


@pytest.mark.parametrize(("build", "targets"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_are_those_of_a_merge_in_memory(
    prepare: Prepare, tmp_path: Path, build: Any, targets: Any, dtype: torch.dtype
) -> None:
    model = prepare(build, targets, dtype=dtype)
    names = tensors(tmp_path / "base").keys()
    # The head of untied_neox has another name in files, which changes the fingerprint.
    assert_same_files(model, tmp_path, check_base=build is not untied_neox)
    untied = tensors(tmp_path / "merged").keys() - names
    assert len(untied) == (build not in (classifier, untied_neox) and "wpe" not in targets)


@pytest.mark.parametrize("name", ["head", "embedding", "both"])
def test_index_of_a_sharded_base_lists_the_new_tensor(
    prepare: Prepare, tmp_path: Path, name: str
) -> None:
    assert_same_files(prepare(*CASES[name], shard="40KB"), tmp_path)
    index = json.loads((tmp_path / "merged" / INDEX).read_text(encoding="utf-8"))
    found = tensors(tmp_path / "merged")
    assert index["weight_map"].keys() == found.keys()
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("name", ["head", "embedding", "both"])
def test_tied_head_that_is_stored_twice_is_untied(
    prepare: Prepare, tmp_path: Path, name: str
) -> None:
    model = prepare(*CASES[name])
    file = tmp_path / "base" / SINGLE
    stored = load_file(file)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, file, metadata={"format": "pt"})
    assert_same_files(model, tmp_path)


@pytest.mark.parametrize("name", ["gpt2 head", "gpt2 embedding"])
@pytest.mark.parametrize("headless", [False, True], ids=["with head", "headless"])
def test_config_without_the_flag_uses_the_default_of_its_class(
    prepare: Prepare, tmp_path: Path, name: str, headless: bool
) -> None:
    """Like the hub's copies of GPT-2: no flag, no head, and names without `transformer.`."""
    model = prepare(*CASES[name])
    if headless:
        file = tmp_path / "base" / SINGLE
        stored = load_file(file)
        renamed = {key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
        save_file(renamed, file, metadata={"format": "pt"})
        edit(tmp_path / "base" / "config.json", architectures=["GPT2Model"])
    edit(tmp_path / "base" / "config.json", without=FLAG)
    merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", check_base=not headless
    )
    merge(model)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval().state_dict()
    assert values(tmp_path / "merged")[FLAG] is False
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_flag_of_a_nested_text_config_is_updated(prepare: Prepare, tmp_path: Path) -> None:
    prepare(*CASES["embedding"])
    text = {"hidden_size": 64, FLAG: True}
    edit(tmp_path / "base" / "config.json", without=FLAG, text_config=text)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    config = values(tmp_path / "merged")
    assert config[FLAG] is False
    assert config["text_config"] == {"hidden_size": 64, FLAG: False}


def test_another_dtype_applies_to_head_and_embedding(prepare: Prepare, tmp_path: Path) -> None:
    model = prepare(*CASES["embedding"])
    merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=torch.bfloat16
    )
    merge(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.bfloat16
    found = loaded.state_dict()
    expected = model.state_dict()
    assert all(torch.equal(value.bfloat16(), found[key]) for key, value in expected.items())


@pytest.mark.parametrize("changed", [False, True], ids=["same", "different"])
def test_base_weight_that_peft_saves_with_an_embedding_is_compared(
    prepare: Prepare, tmp_path: Path, changed: bool
) -> None:
    prepare(*CASES["embedding"])
    config = PeftLoraConfig(
        r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    saved = load_file(file)
    key = next(key for key in saved if key.endswith("embed_tokens.base_layer.weight"))
    if changed:
        save_file({**saved, key: saved[key] + 1}, file)
        with pytest.raises(MergeError, match=r"base weight that is not model.embed_tokens.weight"):
            merge_checkpoint(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    merge_checkpoint(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    ids = torch.arange(2, 11)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids).logits
        found = merged(input_ids=ids).logits
    # The sum is rounded to float32 once, like every product of the unmerged model.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:PEFT applies what is trained of a shared embedding:UserWarning")
@pytest.mark.parametrize(
    ("build", "targets"),
    [(bert, ("word_embeddings",)), (t5, ("shared",)), (t5, ("lm_head",))],
    ids=["bert", "t5", "t5 head"],
)
def test_base_that_may_tie_in_another_way_is_refused(
    prepare: Prepare, tmp_path: Path, build: Any, targets: Any
) -> None:
    prepare(build, targets)
    with pytest.raises(MergeError, match=r"not known .*; merge it in memory and save the model"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
