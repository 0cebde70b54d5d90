"""A folder and the model loaded from it have one fingerprint, however transformers converts it.

A sidecar's digests identify its base in every float dtype, also those of earlier versions.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from lora_core import (
    BaseMismatchError,
    Identity,
    LoraConfig,
    fingerprint,
    fingerprint_of_folder,
    inject,
    load_adapter,
    merge_checkpoint,
    save_adapter,
)
from lora_core.adapter.json_files import IDENTITY
from lora_core.base.identity import digest_of, value_digest
from lora_core.spectrum.updates import read_over_one_base

Build = Callable[..., LlamaForCausalLM]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEXT = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
PAIR = {
    "vocab_size": 101,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
}
LATENT = {
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "GPTNeoXForCausalLM": TEXT,
    "MixtralForCausalLM": {**TEXT, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": {**TEXT, **EXPERTS, "num_experts": 4, "head_dim": 8},
    "DeepseekV3ForCausalLM": {**TEXT, **EXPERTS, **LATENT},
    "BigBirdPegasusForCausalLM": PAIR,
    "BartForConditionalGeneration": PAIR,
    "MarianMTModel": {**PAIR, "decoder_vocab_size": 101},
    "ViTForImageClassification": {
        **{key: TEXT[key] for key in ("hidden_size", "intermediate_size")},
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
    },
    "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model_class = getattr(transformers, name)
    model: PreTrainedModel = model_class(model_class.config_class(**MODELS[name]))
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_has_the_fingerprint_of_any_architecture(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    assert fingerprint_of_folder(tmp_path) == fingerprint(model)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == fingerprint(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert fingerprint_of_folder(tmp_path) != fingerprint(model)


def test_a_merge_on_disk_recognizes_a_base_with_renamed_weights(tmp_path: Path) -> None:
    model = build("GPTNeoXForCausalLM")
    model.save_pretrained(tmp_path / "base")
    save_trained(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        model.get_parameter("gpt_neox.final_layer_norm.bias")[0] += 1
    build_other = build("GPTNeoXForCausalLM")
    with torch.no_grad():
        build_other.get_parameter("gpt_neox.final_layer_norm.bias")[0] += 1
    build_other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="fingerprints"):
        merge_checkpoint(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("trained", DTYPES, ids=str)
def test_an_adapter_loads_on_its_base_in_every_float_dtype(
    stored: torch.dtype, trained: torch.dtype, tmp_path: Path
) -> None:
    model = build("MixtralForCausalLM").to(stored)
    model.save_pretrained(tmp_path / "base")
    save_trained(reload(tmp_path / "base", trained), tmp_path / "adapter")
    for dtype in DTYPES:
        load_adapter(reload(tmp_path / "base", dtype), tmp_path / "adapter")
        other = reload(tmp_path / "base", dtype)
        with torch.no_grad():
            other.get_parameter("model.norm.weight")[0] += 1
        with pytest.raises(BaseMismatchError, match="fingerprints"):
            load_adapter(other, tmp_path / "adapter")


def test_a_sidecar_of_an_earlier_version_identifies_its_base(
    build_llama: Build, tmp_path: Path
) -> None:
    save_trained(build_llama(), tmp_path / "new")
    save_trained(build_llama(), tmp_path / "adapter")
    sidecar = json.loads((tmp_path / "adapter" / IDENTITY).read_text())
    parameters: dict[str, Tensor] = dict(build_llama().named_parameters())
    sidecar["base_digests"] = {"dense": digest_of(parameters)}
    (tmp_path / "adapter" / IDENTITY).write_text(json.dumps(sidecar))
    load_adapter(build_llama(), tmp_path / "adapter")
    read_over_one_base([tmp_path / "new", tmp_path / "adapter"])
    with pytest.raises(BaseMismatchError, match="fingerprints"):
        load_adapter(build_llama(seed=1), tmp_path / "adapter")


def test_counts_ignore_the_arrangement_of_values_and_nothing_else() -> None:
    weight = torch.randn(6, 4)
    before = value_digest([weight])
    assert value_digest(weight.T.contiguous().chunk(2)) == before
    assert value_digest([weight[1:]]) != before
    assert value_digest([-weight]) != before
    assert value_digest([weight * 1.01]) != before


def save_trained(model: nn.Module, folder: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4)
    inject(model, config, seed=0)
    save_adapter(model, folder, config, Identity())


def reload(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    loaded: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return loaded.eval()
