"""A merge on disk equals a merge in memory bit for bit and holds one tensor at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lora_core import LoraConfig, lora_layers, merge
from lora_core.base.weight_files import mapped_tensors, open_checkpoint, write_tensors
from lora_core.merging.streaming import merge_checkpoint

Prepare = Callable[..., LlamaForCausalLM]
FilesIn = Callable[[Path], dict[str, bytes]]
SHARD = "100KB"  # about six shards of the tiny Llama
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["1GB", SHARD], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_on_disk_equals_merge_in_memory_bit_for_bit(
    prepare: Prepare,
    tmp_path: Path,
    dtype: torch.dtype,
    shard: str,
    tied: bool,
) -> None:
    base = tmp_path / "base"
    adapter = tmp_path / "adapter"
    result = tmp_path / "merged"
    model = prepare(shard=shard, dtype=dtype, tied=tied)
    report = merge_checkpoint(base, adapter, result)
    merge(model)
    found = AutoModelForCausalLM.from_pretrained(result).state_dict()
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == dtype
        assert torch.equal(value, expected[name])
    assert len(report.retention) == 14
    assert (len(report.files) > 1) is (shard == SHARD)
    assert {path.name for path in result.iterdir()} == {path.name for path in base.iterdir()}


def test_report_measures_what_the_rounding_retained(
    prepare: Prepare, base: Path, adapter: Path, result: Path
) -> None:
    model = prepare(dtype=torch.bfloat16)
    weights = {name: value.double() for name, value in model.state_dict().items()}
    deltas = {name: layer.delta() for name, layer in lora_layers(model)}
    report = merge_checkpoint(base, adapter, result)
    merged = load_file(result / SINGLE)
    assert report.retention.keys() == deltas.keys()
    for name, delta in deltas.items():
        realized = merged[f"{name}.weight"].double() - weights[f"{name}.base.weight"]
        expected = torch.sum(realized * delta) / torch.sum(delta.double() ** 2)
        # The terms of the sums are float32.
        assert report.retention[name].fraction == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 32},
        },
        {"use_rslora": True, "rank_pattern": {"down_proj": 2}},
    ],
    ids=["patterns", "rslora"],
)
def test_ranks_and_scales_agree_with_peft(
    build_llama: Prepare, base: Path, adapter: Path, result: Path, settings: dict[str, Any]
) -> None:
    model = build_llama()
    model.save_pretrained(base)
    config = PeftLoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        **settings,
    )
    theirs = get_peft_model(model, config)
    theirs.save_pretrained(adapter)
    merge_checkpoint(base, adapter, result)
    compare(result, theirs.merge_and_unload())


@pytest.mark.parametrize("headless", [False, True], ids=["with head", "headless"])
def test_weight_stored_as_in_out_is_merged_transposed(
    base: Path, adapter: Path, result: Path, headless: bool
) -> None:
    """GPT-2's Conv1D: c_attn is 32→96, c_proj of the attention is square.

    The hub's copies have names without `transformer.`.
    """
    config = GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config)
    (model.transformer if headless else model).save_pretrained(base)
    lora = PeftLoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["c_attn", "c_proj"],
        init_lora_weights=False,
        fan_in_fan_out=True,
    )
    theirs = get_peft_model(model, lora)
    theirs.save_pretrained(adapter)
    assert len(merge_checkpoint(base, adapter, result).retention) == 6
    merged = theirs.merge_and_unload()
    compare(result, merged.transformer if headless else merged)


def compare(folder: Path, model: PreTrainedModel) -> None:
    """Compare a saved model with PEFT's merge: one product and one sum, each rounded to float32."""
    reference = model.state_dict()
    for name, weight in load_file(folder / SINGLE).items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shard", ["1GB", SHARD], ids=["single", "sharded"])
def test_another_dtype_is_rounded_once_and_declared(
    prepare: Prepare, base: Path, adapter: Path, result: Path, shard: str
) -> None:
    model = prepare(shard=shard)
    merge_checkpoint(base, adapter, result, dtype=torch.bfloat16)
    merge(model)
    loaded = AutoModelForCausalLM.from_pretrained(result)
    assert loaded.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(torch.bfloat16)), name
    if shard == SHARD:
        assert total_size(result) * 2 == total_size(base)


def total_size(folder: Path) -> int:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return index["metadata"]["total_size"]


def test_other_files_are_copied_except_weights_in_other_formats(
    prepare: Prepare, base: Path, adapter: Path, result: Path, files_in: FilesIn
) -> None:
    prepare()
    (base / "templates").mkdir()
    for name in (
        "tokenizer.json",
        "templates/chat.jinja",
        "pytorch_model.bin",
        "consolidated.safetensors",
        ".cache",
    ):
        (base / name).write_text(name, encoding="utf-8")
    report = merge_checkpoint(base, adapter, result)
    assert report.left_out == ("consolidated.safetensors", "pytorch_model.bin")
    expected = files_in(base)
    for name in (*report.left_out, ".cache", SINGLE):
        del expected[name]
    found = files_in(result)
    del found[SINGLE]
    assert found == expected


def test_existing_result_is_replaced(
    prepare: Prepare, base: Path, adapter: Path, result: Path, files_in: FilesIn
) -> None:
    prepare()
    result.mkdir()
    (result / "old.txt").write_text("old", encoding="utf-8")
    merge_checkpoint(base, adapter, result)
    assert not (result / "old.txt").exists()
    first = files_in(result)
    merge_checkpoint(base, adapter, result)
    assert files_in(result) == first


def test_file_equals_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "wide": torch.arange(3),
        "narrow": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "flag": torch.tensor([True, False, True]),
    }
    tmp_path.joinpath("config.json").write_text("{}", encoding="utf-8")
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    found = open_checkpoint(tmp_path).entries
    entries = dict(sorted(found.items(), key=lambda item: -item[1].dtype.itemsize))
    copy = tmp_path / "copy"
    with mapped_tensors(tmp_path, entries) as mapped:
        write_tensors(copy, entries, (mapped[name] for name in entries))
    copied = load_file(copy)
    assert copied.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert copied[name].dtype == tensor.dtype
        assert torch.equal(copied[name], tensor)
    assert copy.stat().st_size == (tmp_path / SINGLE).stat().st_size


MEASURE = r"""
import re, sys, torch
from pathlib import Path
from lora_core.merging.streaming import merge_checkpoint

def memory(name):
    return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
(torch.randn(64, 4) @ torch.randn(4, 64)).float()
Path("/proc/self/clear_refs").write_text("5")  # reset the peak
before = memory("VmRSS")
merge_checkpoint(*map(Path, sys.argv[1:]))
print(memory("VmHWM") - before)
"""
"""Print the growth of the process's peak memory during a merge, in KiB."""


def write_large_base(folder: Path) -> None:
    """Write 128 MiB of weights in eight shards."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(8):
        file = f"model-0000{shard + 1}-of-00008.safetensors"
        layers = range(4 * shard, 4 * shard + 4)
        tensors = {f"model.layers.{i}.proj.weight": torch.randn(1024, 1024) for i in layers}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")


def write_adapter_of_large_base(folder: Path) -> None:
    folder.mkdir()
    factors = {}
    for i in range(32):
        prefix = f"base_model.model.model.layers.{i}.proj"
        factors[f"{prefix}.lora_A.weight"] = torch.randn(4, 1024)
        factors[f"{prefix}.lora_B.weight"] = torch.randn(1024, 4)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the peak of a process's memory is read from Linux's /proc",
)
def test_memory_use_is_that_of_one_shard(base: Path, adapter: Path, result: Path) -> None:
    """Expected growth: 16 MiB of file mapped at once, and a few copies of a tensor of 4 MiB."""
    write_large_base(base)
    write_adapter_of_large_base(adapter)
    command = [sys.executable, "-c", MEASURE, str(base), str(adapter), str(result)]
    # Return freed memory to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    growth_mib = int(run.stdout) / 1024
    assert 4 < growth_mib < 72


def test_untied_head_is_merged(prepare: Prepare, base: Path, adapter: Path, result: Path) -> None:
    model = prepare(LoraConfig(r=4, lora_alpha=8, target_modules=("lm_head",)))
    merge_checkpoint(base, adapter, result)
    merge(model)
    assert torch.equal(load_file(result / SINGLE)["lm_head.weight"], model.lm_head.weight)
