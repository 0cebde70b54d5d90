"""Equal adapters have equal bytes in the published format, and a failing save changes nothing."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from lora_core import AdapterError, Identity, LoraConfig, fingerprint, inject, save_adapter
from lora_core.adapter.json_files import CONFIG, IDENTITY, PREFIX, WEIGHTS, read_identity
from lora_core.base.identity import ModelSource

Build = Callable[..., LlamaForCausalLM]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# --- file format ---


def test_equal_adapters_give_equal_bytes(
    build_llama: Build, randomize: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """Two runs list their targets and their lineage in different orders."""
    runs = {
        "one": (("q_proj", "up_proj", "k_proj"), {"data": "d", "recipe": "r"}),
        "two": (("up_proj", "k_proj", "q_proj"), {"recipe": "r", "data": "d"}),
    }
    for name, (targets, lineage) in runs.items():
        model = build_llama()
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        inject(model, config, seed=0)
        randomize(model)
        save_adapter(model, tmp_path / name, config, Identity(base="b", lineage=lineage))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert set(digests(tmp_path / "one")) == {WEIGHTS, CONFIG, IDENTITY}


def test_the_weights_file_is_in_the_published_format(
    adapted: LlamaForCausalLM, adapter_folder: Path
) -> None:
    with safe_open(adapter_folder / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(adapter_folder / WEIGHTS)
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    expected = {}
    for i in (0, 1):
        for part, inputs, outputs in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 128, 64)):
            path = f"base_model.model.model.layers.{i}.{part}"
            expected[f"{path}.lora_A.weight"] = ((4, inputs), torch.float32)
            expected[f"{path}.lora_B.weight"] = ((outputs, 4), torch.float32)
    assert found == expected
    stored = tensors[f"{PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"]
    assert torch.equal(stored, adapted.model.layers[1].mlp.down_proj.lora_B)


def test_the_config_file_is_in_the_published_format(adapter_folder: Path) -> None:
    values = json.loads((adapter_folder / CONFIG).read_text(encoding="utf-8"))
    assert list(values) == sorted(values)
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny llama",
        "bias": "none",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["down_proj", "q_proj"],
        "use_dora": False,
        "rank_pattern": {},
        "inference_mode": True,
    }
    assert {key: values[key] for key in expected} == expected


def test_the_sidecar_records_base_digests_and_lineage(
    adapted: LlamaForCausalLM, small_config: LoraConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    identity = Identity(
        base="hub/name", revision="abc", base_digests={"nf4": "n"}, lineage={"data": "d"}
    )
    sha256 = save_adapter(adapted, folder, small_config, identity)
    found = read_identity(folder)
    assert found is not None
    assert sha256 == digests(folder)[WEIGHTS] == found["adapter_sha256"]
    source = ModelSource(adapted)
    assert source.samples.keys() == {"dense-sampled", "dense-sampled-float16"}
    dense = {"dense": fingerprint(adapted)[1], **source.samples}
    assert found["base_digests"] == {"nf4": "n", **dense}
    assert found["base"] == "hub/name"
    assert found["revision"] == "abc"
    assert found["lineage"] == {"data": "d"}
    tensors = load_file(folder / WEIGHTS)
    expected = {}
    for key, tensor in tensors.items():
        expected[key] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert found["tensor_sha256"] == expected


def test_wrappers_do_not_change_the_files(
    adapted: LlamaForCausalLM,
    adapter_folder: Path,
    small_config: LoraConfig,
    wrapper: Callable[[nn.Module], nn.Module],
) -> None:
    wrapped = adapter_folder.with_name("wrapped")
    save_adapter(wrapper(adapted), wrapped, small_config, Identity(base="tiny llama"))
    assert digests(wrapped) == digests(adapter_folder)


# --- failing save ---


def with_nan(model: nn.Module) -> None:
    model.get_parameter("model.layers.1.mlp.down_proj.lora_B").data[3, 1] = math.nan


def with_infinity(model: nn.Module) -> None:
    model.get_parameter("model.layers.0.self_attn.q_proj.lora_A").data[0, 0] = -math.inf


def not_gathered(model: nn.Module) -> None:
    """Give a parameter the shape it has on a process without its shard of a sharded model."""
    model.get_parameter("model.layers.0.self_attn.q_proj.lora_A").data = torch.empty(0)


def partly_gathered(model: nn.Module) -> None:
    model.get_parameter("model.layers.0.self_attn.q_proj.lora_A").data = torch.zeros(2, 64)


@pytest.mark.parametrize(
    "corrupt",
    [with_nan, with_infinity, not_gathered, partly_gathered],
    ids=lambda function: function.__name__,
)
def test_an_invalid_adapter_is_not_written(
    adapted: LlamaForCausalLM,
    adapter_folder: Path,
    small_config: LoraConfig,
    corrupt: Callable[[nn.Module], None],
) -> None:
    before = digests(adapter_folder)
    corrupt(adapted)
    with pytest.raises(AdapterError, match=r"layers\.\d\..*lora_[AB]"):
        save_adapter(adapted, adapter_folder, small_config, Identity())
    assert digests(adapter_folder) == before


def test_a_model_without_an_adapter_is_not_written(
    build_llama: Build, small_config: LoraConfig, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="adapter"):
        save_adapter(build_llama(), tmp_path / "adapter", small_config, Identity())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "down_proj")),
        LoraConfig(r=4, lora_alpha=16, target_modules=("q_proj", "down_proj")),
        LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj"), use_rslora=True),
        LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",)),
    ],
    ids=["rank", "alpha", "rslora", "targets"],
)
def test_a_config_other_than_the_injected_one_is_not_written(
    adapted: LlamaForCausalLM, tmp_path: Path, other: LoraConfig
) -> None:
    """Such a folder would not load, or would load with another scale."""
    with pytest.raises(AdapterError, match="config"):
        save_adapter(adapted, tmp_path / "adapter", other, Identity())
    assert list(tmp_path.iterdir()) == []


def refuse_weights(*_: object, **__: object) -> None:
    raise OSError("no space left")


@pytest.mark.parametrize("stage", ["weights", "sidecar"])
def test_a_failing_write_keeps_the_previous_folder(
    adapted: LlamaForCausalLM,
    adapter_folder: Path,
    small_config: LoraConfig,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    before = digests(adapter_folder)
    siblings = sorted(adapter_folder.parent.iterdir())
    lineage: dict[str, Any] = {}
    if stage == "weights":
        monkeypatch.setattr("lora_core.adapter.rewriting.save_file", refuse_weights)
    else:
        # Not valid JSON: detected after the other two files are written.
        lineage["data"] = object()
    with pytest.raises((OSError, TypeError)):
        save_adapter(adapted, adapter_folder, small_config, Identity(lineage=lineage))
    assert digests(adapter_folder) == before
    assert sorted(adapter_folder.parent.iterdir()) == siblings
