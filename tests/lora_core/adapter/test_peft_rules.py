"""Files of PEFT are read by PEFT's own rules for names and keys, and give PEFT's outputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification, LlamaForCausalLM

from lora_core import AdapterError, convert_pickled_adapter, load_adapter, merge_checkpoint
from lora_core.adapter.json_files import CONFIG, WEIGHTS
from lora_core.spectrum.updates import read_updates

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:`loftq_config` specified but:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def save_with_peft(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """Adapt `model` with PEFT, train it on noise, save the adapter and return the model."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted


def edit_config(folder: Path, **change: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **change}))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "not_in_this_model"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "loftq_config": {"loftq_bits": 4}},
        {"target_modules": ["q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "rank_pattern": {"other": 2, "layers.1.*q_proj": 2}},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj"], "bias": "all"},
    ],
    ids=str,
)
def test_a_file_of_peft_gives_its_logits(
    build_llama: Build, logits: Logits, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapted = save_with_peft(build_llama(), tmp_path, **settings)
    model = build_llama()
    load_adapter(model, tmp_path)
    assert torch.allclose(logits(model), logits(adapted), atol=1e-5)
    assert not torch.allclose(logits(model), logits(build_llama()), atol=1e-2)


def test_a_rank_above_the_smaller_side_of_a_layer_loads(
    build_llama: Build, logits: Logits, tmp_path: Path
) -> None:
    settings = {"target_modules": ["k_proj"], "rank_pattern": {"k_proj": 48}}
    adapted = save_with_peft(build_llama(), tmp_path, **settings)
    model = build_llama()
    load_adapter(model, tmp_path)
    assert torch.allclose(logits(model), logits(adapted), atol=1e-5)


def test_a_suffix_of_a_saved_module_matches_as_in_peft(tmp_path: Path) -> None:
    """PEFT saves pre_classifier for the name `classifier`."""
    config = DistilBertConfig(vocab_size=101, dim=32, hidden_dim=64, n_layers=1, n_heads=4)

    def build() -> DistilBertForSequenceClassification:
        torch.manual_seed(3)
        return DistilBertForSequenceClassification(config).eval()

    adapted = save_with_peft(build(), tmp_path, task_type="SEQ_CLS", target_modules=["q_lin"])
    assert "base_model.model.pre_classifier.weight" in load_file(tmp_path / WEIGHTS)
    model = build()
    load_adapter(model, tmp_path)
    ids = torch.arange(6).view(2, 3)
    assert torch.allclose(model(ids).logits, adapted(ids).logits, atol=1e-5)


def test_a_file_without_target_modules_adapts_what_it_holds(
    build_llama: Build, logits: Logits, tmp_path: Path
) -> None:
    adapted = save_with_peft(build_llama(), tmp_path, target_modules=["q_proj", "up_proj"])
    edit_config(tmp_path, target_modules=None)
    model = build_llama()
    load_adapter(model, tmp_path)
    assert torch.allclose(logits(model), logits(adapted), atol=1e-5)


def test_missing_updates_of_a_named_target_are_refused(
    build_llama: Build, tmp_path: Path, refuses: Callable[..., None]
) -> None:
    save_with_peft(build_llama(), tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / WEIGHTS)
    kept = {key: value for key, value in tensors.items() if not key.startswith(QUERY)}
    save_file(kept, tmp_path / WEIGHTS)
    model = build_llama()
    refuses(model, lambda: load_adapter(model, tmp_path), AdapterError, "2 missing")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("lora_A.weight", "lora_A.default.weight"),
        ("base_model.model.", "base_model.model._orig_mod."),
        ("layers.0.", "layers.0._fsdp_wrapped_module."),
        ("self_attn.", "self_attn._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
)
def test_keys_of_wrapped_models_are_read(
    build_llama: Build, logits: Logits, tmp_path: Path, before: str, after: str
) -> None:
    adapted = save_with_peft(build_llama(), tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / WEIGHTS)
    renamed = {key.replace(before, after): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / WEIGHTS)
    model = build_llama()
    load_adapter(model, tmp_path)
    assert torch.allclose(logits(model), logits(adapted), atol=1e-5)
    assert len(read_updates(tmp_path)) == 2


def test_two_tensors_of_one_key_are_refused(build_llama: Build, tmp_path: Path) -> None:
    save_with_peft(build_llama(), tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / WEIGHTS)
    key = f"{QUERY}.lora_A.weight"
    save_file({**tensors, key.replace("A.", "A.default."): tensors[key] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="two different tensors"):
        load_adapter(build_llama(), tmp_path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_copy_of_the_head_is_checked_and_merged(
    build_llama: Build, logits: Logits, tmp_path: Path, tied: bool
) -> None:
    build_llama(tied=tied).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapted = save_with_peft(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-4)


def test_a_tied_update_of_the_head_is_refused(
    build_llama: Build, tmp_path: Path, refuses: Callable[..., None]
) -> None:
    save_with_peft(build_llama(), tmp_path, target_modules=["q_proj", "lm_head"])
    edit_config(tmp_path, ensure_weight_tying=True)
    model = build_llama(tied=True)
    refuses(model, lambda: load_adapter(model, tmp_path), AdapterError, "ensure_weight_tying")
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        read_updates(tmp_path)


def test_a_pickled_adapter_is_converted(build_llama: Build, logits: Logits, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    adapted = save_with_peft(build_llama(), folder, target_modules=["q_proj"])
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="convert_pickled_adapter"):
        load_adapter(build_llama(), folder)
    convert_pickled_adapter(folder, tmp_path / "new")
    model = build_llama()
    load_adapter(model, tmp_path / "new")
    assert torch.allclose(logits(model), logits(adapted), atol=1e-5)


@pytest.mark.parametrize("content", [print, [1, 2], {"a": 1}], ids=["code", "list", "number"])
def test_a_pickle_of_anything_but_tensors_is_refused(
    build_llama: Build, tmp_path: Path, content: object
) -> None:
    folder = tmp_path / "old"
    save_with_peft(build_llama(), folder, target_modules=["q_proj"])
    torch.save(content, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"must map names|more than tensors"):
        convert_pickled_adapter(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()
