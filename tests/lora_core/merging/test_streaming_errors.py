"""A refused merge on disk names the cause and leaves every file unchanged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, ViTConfig, ViTModel

from lora_core import (
    AdapterError,
    BaseMismatchError,
    Identity,
    LoraConfig,
    MergeError,
    inject,
    save_adapter,
)
from lora_core.errors import CheckpointError, LoraError
from lora_core.merging.streaming import merge_checkpoint

Prepare = Callable[..., LlamaForCausalLM]
Refused = Callable[..., None]
SHARD = "100KB"  # about six shards of the tiny Llama
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def refused(
    tmp_path: Path,
    base: Path,
    adapter: Path,
    result: Path,
    files_in: Callable[[Path], dict[str, bytes]],
) -> Refused:
    """Check that a merge raises and leaves every file unchanged."""

    def check(
        error: type[LoraError], message: str, destination: Path = result, **options: Any
    ) -> None:
        before = files_in(tmp_path)
        with pytest.raises(error, match=message):
            merge_checkpoint(base, adapter, destination, **options)
        assert files_in(tmp_path) == before

    return check


def edit_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


def replace_tensor(folder: Path, name: str, tensor: Tensor | None) -> None:
    """Replace a tensor of a saved base, or delete it."""
    tensors = load_file(folder / SINGLE)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def test_target_without_a_tensor_is_refused(prepare: Prepare, base: Path, refused: Refused) -> None:
    prepare()
    replace_tensor(base, UP_PROJ, None)
    refused(MergeError, f"no tensor {UP_PROJ}", check_base=False)


def test_names_that_differ_in_the_files_of_the_right_base_are_a_stated_cause(
    base: Path, adapter: Path, refused: Refused
) -> None:
    """transformers saves the blocks of a ViT under other paths than it loads them."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    model = ViTModel(ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj",))
    inject(model, config, seed=0)
    save_adapter(model, adapter, config, Identity())
    refused(MergeError, "have former names of the modules and no renames are given")


def test_weight_of_another_shape_is_refused(prepare: Prepare, base: Path, refused: Refused) -> None:
    prepare()
    replace_tensor(base, UP_PROJ, torch.zeros(128, 32))
    message = r"update of model.layers.1.mlp.up_proj is \(128, 64\) and its weight \(128, 32\)"
    refused(MergeError, message, check_base=False)


def test_integer_weight_is_refused(prepare: Prepare, base: Path, refused: Refused) -> None:
    prepare()
    replace_tensor(base, UP_PROJ, torch.zeros(128, 64, dtype=torch.int8))
    refused(MergeError, "is stored as torch.int8", check_base=False)


def test_quantized_base_is_refused(prepare: Prepare, base: Path, refused: Refused) -> None:
    prepare()
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(base / "config.json", quantization_config=quantization)
    refused(CheckpointError, "quantization_config.*merge into the checkpoint that it was made from")


def test_another_base_is_refused(
    prepare: Prepare,
    build_llama: Prepare,
    base: Path,
    adapter: Path,
    result: Path,
    refused: Refused,
) -> None:
    prepare()
    build_llama(seed=1).save_pretrained(base)
    refused(BaseMismatchError, "was trained on tiny llama")
    merge_checkpoint(base, adapter, result, check_base=False)


def test_overflow_is_refused_after_shards_were_written(
    prepare: Prepare, adapter: Path, refused: Refused
) -> None:
    """The first shards fit into float16; a later one exceeds its maximum, 65,504."""
    prepare(shard=SHARD)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"].fill_(1e6)
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_identity.json").unlink()
    refused(
        MergeError,
        r"layers.1.self_attn.v_proj.weight: the merged weight is not finite in torch.float16",
        dtype=torch.float16,
    )


def test_integer_dtype_is_refused(prepare: Prepare, refused: Refused) -> None:
    prepare()
    refused(MergeError, "dtype=torch.int8 cannot hold", dtype=torch.int8)


@pytest.mark.parametrize("where", ["base", "adapter", "base/inside", "."])
def test_destination_that_overlaps_a_source_is_refused(
    prepare: Prepare, tmp_path: Path, refused: Refused, where: str
) -> None:
    prepare()
    refused(MergeError, "overlaps", destination=tmp_path / where)


def test_damaged_adapter_is_refused(prepare: Prepare, adapter: Path, refused: Refused) -> None:
    prepare()
    edit_json(adapter / "adapter_config.json", use_dora=True)
    refused(AdapterError, "adapter_config.json has sha256")


def second_shard(folder: Path) -> Path:
    return next(folder.glob("model-00002*"))


def map_one_tensor(folder: Path, file: str) -> None:
    edit_json(folder / INDEX, weight_map={"x": file})


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing config": (
        lambda folder: (folder / "config.json").unlink(),
        "config.json is missing",
    ),
    "invalid json": (
        lambda folder: (folder / "config.json").write_text("[", encoding="utf-8"),
        "config.json cannot be read",
    ),
    "missing index": (
        lambda folder: (folder / INDEX).unlink(),
        "has neither",
    ),
    "missing shard": (
        lambda folder: second_shard(folder).unlink(),
        "model-00002-of-0000.*is missing",
    ),
    "short shard": (
        lambda folder: second_shard(folder).write_bytes(b"short"),
        "is damaged",
    ),
    "empty map": (
        lambda folder: edit_json(folder / INDEX, weight_map={}),
        "has no weight_map",
    ),
    "map outside the folder": (
        lambda folder: map_one_tensor(folder, "../elsewhere.safetensors"),
        "has no weight_map",
    ),
    "map of other tensors": (
        lambda folder: map_one_tensor(folder, second_shard(folder).name),
        "disagree about .* tensors",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_incomplete_base_is_refused(
    prepare: Prepare,
    base: Path,
    refused: Refused,
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    prepare(shard=SHARD)
    damage(base)
    refused(CheckpointError, message)


def test_pickle_is_refused(prepare: Prepare, base: Path, refused: Refused) -> None:
    prepare()
    (base / SINGLE).rename(base / "pytorch_model.bin")
    refused(CheckpointError, "pytorch_model.bin is a pickle")
