"""A fingerprint identifies a base: equal for all copies of a checkpoint, blind to adapters."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import LoraConfig, fingerprint, inject
from lora_core.base.identity import (
    SAMPLES_PER_TENSOR,
    digest_of,
    fingerprint_of_folder,
    value_digest,
)

Build = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_copies_of_one_checkpoint_agree(build_llama: Build, dtype: torch.dtype) -> None:
    assert fingerprint(build_llama(dtype=dtype)) == fingerprint(build_llama())
    assert fingerprint(build_llama(seed=1)) != fingerprint(build_llama())


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_one_changed_weight_changes_the_fingerprint(build_llama: Build, name: str) -> None:
    model = build_llama()
    before = fingerprint(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] += 1
    assert fingerprint(model) != before


def test_samples_are_evenly_spaced() -> None:
    """Any numel / SAMPLES consecutive values include a sample, so changing them all is detected."""
    tensor = torch.randn(40, 50)
    length = -(-tensor.numel() // SAMPLES_PER_TENSOR)
    before = digest_of({"weight": tensor})
    for start in range(0, tensor.numel() - length, 97):
        changed = tensor.clone()
        changed.view(-1)[start : start + length] += 1
        assert digest_of({"weight": changed}) != before


def test_names_and_shapes_matter_and_order_does_not() -> None:
    one = torch.ones(2, 6)
    two = torch.zeros(3)
    before = digest_of({"a": one, "b": two})
    assert digest_of({"b": two, "a": one}) == before
    assert digest_of({"a": one, "c": two}) != before
    assert digest_of({"a": one.view(3, 4), "b": two}) != before
    assert digest_of({"a": one}) != before


def test_empty_scalar_and_integer_tensors_have_a_digest() -> None:
    tensors = {
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "codes": torch.arange(9, dtype=torch.uint8),
    }
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    assert digest_of(tensors) == digest_of(copies)
    assert digest_of(tensors) != digest_of({**tensors, "scalar": torch.tensor(3.5)})


def test_an_adapter_does_not_change_the_fingerprint(
    build_llama: Build, randomize: Callable[[nn.Module], None]
) -> None:
    model = build_llama()
    before = fingerprint(model)
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=0)
    assert fingerprint(model) == before
    randomize(model)
    assert fingerprint(model) == before


def test_an_adapter_on_a_layer_named_base_does_not_change_the_fingerprint() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"base": nn.Linear(8, 8)})})
    before = fingerprint(model)
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=0)
    assert fingerprint(model) == before


def test_wrappers_do_not_change_the_fingerprint(
    build_llama: Build, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    model = build_llama()
    assert fingerprint(wrapper(model)) == fingerprint(model)


def test_tied_embeddings_count_once(build_llama: Build) -> None:
    model = build_llama(tied=True)
    distinct: dict[str, Tensor] = dict(model.state_dict())
    del distinct["lm_head.weight"]
    assert fingerprint(model) == ("dense", value_digest(distinct.values()))


def test_nf4_has_a_separate_fingerprint(
    build_llama: Build, build_nf4_llama: Build, randomize: Callable[[nn.Module], None]
) -> None:
    model = build_nf4_llama()
    kind, digest = fingerprint(model)
    assert kind == "nf4"
    dense_kind, dense_digest = fingerprint(build_llama())
    assert dense_kind == "dense"
    assert digest != dense_digest
    assert fingerprint(build_nf4_llama()) == (kind, digest)
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=0)
    randomize(model)
    assert fingerprint(model) == (kind, digest)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.base.weight.view(-1)[0] ^= 0xFF
    assert fingerprint(model) != (kind, digest)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["1GB", "100KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_has_the_fingerprint_of_its_model(
    build_llama: Build, tmp_path: Path, dtype: torch.dtype, shard: str, tied: bool
) -> None:
    model = build_llama(tied=tied, dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() is (shard != "1GB")
    assert fingerprint_of_folder(tmp_path) == fingerprint(model)
    assert fingerprint_of_folder(tmp_path) != fingerprint(build_llama(tied=tied, seed=1))


def test_a_tied_head_stored_twice_counts_once(build_llama: Build, tmp_path: Path) -> None:
    model = build_llama(tied=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint_of_folder(tmp_path) == fingerprint(model)


def test_one_changed_value_in_the_file_changes_the_fingerprint(
    build_llama: Build, tmp_path: Path
) -> None:
    build_llama().save_pretrained(tmp_path)
    before = fingerprint_of_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].view(-1)[0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint_of_folder(tmp_path) != before
