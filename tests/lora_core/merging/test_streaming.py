"""A merge on disk gives the bits of a merge in memory, holds one tensor at a time, and when refused leaves nothing."""

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
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lora_core import (
    AdapterError,
    BaseMismatchError,
    Identity,
    LoraConfig,
    MergeError,
    inject,
    merge,
    save_adapter,
)
from lora_core.base.weight_files import mapped_tensors, open_checkpoint, write_tensors
from lora_core.errors import CheckpointError, LoraError
from lora_core.merging.streaming import merge_checkpoint

Build = Callable[..., LlamaForCausalLM]
CONFIG = LoraConfig(r=4, lora_alpha=8)
SHARD = "100KB"  # about six shards of the tiny Llama
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# PEFT 0.21 asks transformers 5.23 under a name that transformers renames in 6; nothing about the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return tmp_path / "merged"


@pytest.fixture
def prepare(
    build_llama: Build, randomise: Callable[[nn.Module], None], base: Path, adapter: Path
) -> Callable[..., LlamaForCausalLM]:
    """Return a maker of a saved base and a saved adapter; it returns the adapted model."""

    def make(config: LoraConfig = CONFIG, shard: str = "1GB", **options: Any) -> LlamaForCausalLM:
        build_llama(**options).save_pretrained(base, max_shard_size=shard)
        model = build_llama(**options)
        inject(model, config, seed=0)
        randomise(model)
        save_adapter(model, adapter, config, Identity(base="tiny llama"))
        return model

    return make


@pytest.fixture
def refused(tmp_path: Path, base: Path, adapter: Path, result: Path) -> Callable[..., None]:
    """Return a check that a merge raises and that every file is then what it was."""

    def check(
        error: type[LoraError], message: str, destination: Path = result, **options: Any
    ) -> None:
        before = tree(tmp_path)
        with pytest.raises(error, match=message):
            merge_checkpoint(base, adapter, destination, **options)
        assert tree(tmp_path) == before

    return check


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder`, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def edit(path: Path, **values: Any) -> None:
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8"
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["1GB", SHARD], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_merge_in_memory_bit_for_bit(
    prepare: Callable[..., LlamaForCausalLM],
    tmp_path: Path,
    dtype: torch.dtype,
    shard: str,
    tied: bool,
) -> None:
    base, result = tmp_path / "base", tmp_path / "merged"
    model = prepare(shard=shard, dtype=dtype, tied=tied)
    report = merge_checkpoint(base, tmp_path / "adapter", result)
    merge(model)
    found, expected = AutoModelForCausalLM.from_pretrained(result).state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(value, expected[name]) and value.dtype == dtype for name, value in found.items()
    )
    assert len(report.kept) == 14 and (len(report.files) > 1) is (shard == SHARD)
    assert {path.name for path in result.iterdir()} == {path.name for path in base.iterdir()}


def test_the_report_says_what_the_rounding_kept(
    prepare: Callable[..., LlamaForCausalLM], base: Path, adapter: Path, result: Path
) -> None:
    model = prepare(dtype=torch.bfloat16)
    before = {
        name: value.float()
        for name, value in model.state_dict().items()
        if name.endswith("base.weight")
    }
    deltas = {
        name: module.delta() for name, module in model.named_modules() if hasattr(module, "delta")
    }
    report = merge_checkpoint(base, adapter, result)
    merged = load_file(result / SINGLE)
    assert report.kept.keys() == deltas.keys()
    for name, delta in deltas.items():
        realised = merged[f"{name}.weight"].double() - before[f"{name}.base.weight"].double()
        expected = torch.sum(realised * delta) / torch.sum(delta.double() ** 2)
        assert report.kept[name].fraction == pytest.approx(
            expected.item(), rel=1e-5
        )  # the sums are of float32 terms


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
def test_ranks_and_scales_are_those_of_peft(
    build_llama: Build, base: Path, adapter: Path, result: Path, settings: dict[str, Any]
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
def test_a_weight_stored_as_in_out_is_merged_transposed(
    base: Path, adapter: Path, result: Path, headless: bool
) -> None:
    """GPT-2's Conv1D: c_attn is 32→96, c_proj of the attention is square. The hub's copies have names without `transformer.`."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    )
    (model.transformer if headless else model).save_pretrained(base)
    config = PeftLoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["c_attn", "c_proj"],
        init_lora_weights=False,
        fan_in_fan_out=True,
    )
    theirs = get_peft_model(model, config)
    theirs.save_pretrained(adapter)
    assert len(merge_checkpoint(base, adapter, result).kept) == 6
    merged = theirs.merge_and_unload()
    compare(result, merged.transformer if headless else merged)


def compare(folder: Path, model: PreTrainedModel) -> None:
    """Compare a saved model with one that PEFT has merged: one product and one sum, each rounded to float32."""
    reference = model.state_dict()
    for name, weight in load_file(folder / SINGLE).items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shard", ["1GB", SHARD], ids=["single", "sharded"])
def test_another_dtype_is_rounded_once_and_declared(
    prepare: Callable[..., LlamaForCausalLM], base: Path, adapter: Path, result: Path, shard: str
) -> None:
    model = prepare(shard=shard)
    merge_checkpoint(base, adapter, result, dtype=torch.bfloat16)
    merge(model)
    loaded = AutoModelForCausalLM.from_pretrained(result)
    assert loaded.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(torch.bfloat16)), name
    if shard == SHARD:
        sizes = [
            json.loads((folder / INDEX).read_text(encoding="utf-8"))["metadata"]["total_size"]
            for folder in (base, result)
        ]
        assert sizes[1] * 2 == sizes[0]


def test_other_files_are_copied_and_other_forms_of_the_weights_are_not(
    prepare: Callable[..., LlamaForCausalLM], base: Path, adapter: Path, result: Path
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
    kept = {
        name: content
        for name, content in tree(base).items()
        if name not in {*report.left_out, ".cache", SINGLE}
    }
    assert {name: content for name, content in tree(result).items() if name != SINGLE} == kept


def test_a_former_result_is_replaced(
    prepare: Callable[..., LlamaForCausalLM], base: Path, adapter: Path, result: Path
) -> None:
    prepare()
    result.mkdir()
    (result / "old.txt").write_text("old", encoding="utf-8")
    merge_checkpoint(base, adapter, result)
    assert not (result / "old.txt").exists()
    first = tree(result)
    merge_checkpoint(base, adapter, result)
    assert tree(result) == first


def test_a_file_is_written_as_safetensors_writes_it(tmp_path: Path) -> None:
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
    entries = dict(
        sorted(open_checkpoint(tmp_path).entries.items(), key=lambda item: -item[1].dtype.itemsize)
    )
    with mapped_tensors(tmp_path, entries) as mapped:
        write_tensors(tmp_path / "again", entries, (mapped[name] for name in entries))
    again = load_file(tmp_path / "again")
    assert again.keys() == tensors.keys()
    assert all(
        torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype
        for name in tensors
    )
    assert (tmp_path / "again").stat().st_size == (tmp_path / SINGLE).stat().st_size


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the peak of a process's memory is read from Linux's /proc",
)
def test_memory_is_that_of_a_shard(tmp_path: Path, adapter: Path) -> None:
    """128 MiB of weights in eight shards. Growth: 16 MiB of file mapped at once, and some copies of one tensor of 4 MiB."""
    index: dict[str, str] = {}
    for shard in range(8):
        name = f"model-0000{shard + 1}-of-00008.safetensors"
        tensors = {
            f"model.layers.{4 * shard + i}.proj.weight": torch.randn(1024, 1024) for i in range(4)
        }
        (tmp_path / "big").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "big" / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (tmp_path / "big" / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )
    (tmp_path / "big" / "config.json").write_text("{}", encoding="utf-8")
    shapes = {"A": (4, 1024), "B": (1024, 4)}
    factors = {
        f"base_model.model.model.layers.{i}.proj.lora_{x}.weight": torch.randn(*shapes[x])
        for i in range(32)
        for x in "AB"
    }
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    program = (
        "import re, sys, torch; from pathlib import Path; from lora_core.merging.streaming import merge_checkpoint\n"
        "torch.set_num_threads(1); (torch.randn(64, 4) @ torch.randn(4, 64)).float()\n"
        "figure = lambda name: int(re.search(name + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "Path('/proc/self/clear_refs').write_text('5'); before = figure('VmRSS')  # the peak starts anew\n"
        "merge_checkpoint(*map(Path, sys.argv[1:]))\n"
        "print(figure('VmHWM') - before)"
    )
    run = [
        sys.executable,
        "-c",
        program,
        str(tmp_path / "big"),
        str(adapter),
        str(tmp_path / "result"),
    ]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # what is freed goes back at once instead of being kept for later
    grown = (
        int(subprocess.run(run, check=True, capture_output=True, text=True, env=environment).stdout)
        / 1024
    )
    assert 4 < grown < 72


def test_a_target_without_a_tensor_is_refused(
    prepare: Callable[..., LlamaForCausalLM], base: Path, refused: Callable[..., None]
) -> None:
    prepare()
    tensors = load_file(base / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / SINGLE, metadata={"format": "pt"})
    refused(MergeError, "no tensor model.layers.1.mlp.up_proj.weight", check_base=False)


def test_a_weight_of_another_shape_is_refused(
    prepare: Callable[..., LlamaForCausalLM], base: Path, refused: Callable[..., None]
) -> None:
    prepare()
    tensors = load_file(base / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(128, 32)
    save_file(tensors, base / SINGLE, metadata={"format": "pt"})
    refused(
        MergeError,
        r"update of model.layers.1.mlp.up_proj is \(128, 64\) and its weight \(128, 32\)",
        check_base=False,
    )


def test_a_weight_of_whole_numbers_is_refused(
    prepare: Callable[..., LlamaForCausalLM], base: Path, refused: Callable[..., None]
) -> None:
    prepare()
    tensors = load_file(base / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(128, 64, dtype=torch.int8)
    save_file(tensors, base / SINGLE, metadata={"format": "pt"})
    refused(MergeError, "is stored as torch.int8", check_base=False)


def test_an_untied_head_is_merged(
    prepare: Callable[..., LlamaForCausalLM], base: Path, adapter: Path, result: Path
) -> None:
    model = prepare(LoraConfig(r=4, lora_alpha=8, target_modules=("lm_head",)))
    merge_checkpoint(base, adapter, result)
    merge(model)
    assert torch.equal(load_file(result / SINGLE)["lm_head.weight"], model.lm_head.weight)


def test_a_quantised_base_is_refused(
    prepare: Callable[..., LlamaForCausalLM], base: Path, refused: Callable[..., None]
) -> None:
    prepare()
    edit(
        base / "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )
    refused(CheckpointError, "quantization_config.*merge into the checkpoint that it was made from")


def test_another_base_is_refused(
    prepare: Callable[..., LlamaForCausalLM],
    build_llama: Build,
    base: Path,
    adapter: Path,
    result: Path,
    refused: Callable[..., None],
) -> None:
    prepare()
    build_llama(seed=1).save_pretrained(base)
    refused(BaseMismatchError, "was trained on tiny llama")
    merge_checkpoint(base, adapter, result, check_base=False)


def test_a_sum_that_overflows_is_refused_though_shards_were_written(
    prepare: Callable[..., LlamaForCausalLM], adapter: Path, refused: Callable[..., None]
) -> None:
    """The first shards fit into float16, a later one exceeds what it can hold, 65,504."""
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


def test_a_dtype_that_holds_no_weight_is_refused(
    prepare: Callable[..., LlamaForCausalLM], refused: Callable[..., None]
) -> None:
    prepare()
    refused(MergeError, "dtype=torch.int8 cannot hold", dtype=torch.int8)


@pytest.mark.parametrize("where", ["base", "adapter", "base/inside", "."])
def test_a_destination_over_a_source_is_refused(
    prepare: Callable[..., LlamaForCausalLM],
    tmp_path: Path,
    refused: Callable[..., None],
    where: str,
) -> None:
    prepare()
    refused(MergeError, "overlaps", destination=tmp_path / where)


def test_a_damaged_adapter_is_refused(
    prepare: Callable[..., LlamaForCausalLM], adapter: Path, refused: Callable[..., None]
) -> None:
    prepare()
    edit(adapter / "adapter_config.json", use_dora=True)
    refused(AdapterError, "adapter_config.json has sha256")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (
            lambda folder: (folder / "config.json").write_text("[", encoding="utf-8"),
            "config.json cannot be read",
        ),
        (lambda folder: (folder / INDEX).unlink(), "has neither"),
        (
            lambda folder: next(folder.glob("model-00002*")).unlink(),
            "model-00002-of-0000.*is missing",
        ),
        (lambda folder: next(folder.glob("model-00002*")).write_bytes(b"short"), "is damaged"),
        (lambda folder: edit(folder / INDEX, weight_map={}), "has no weight_map"),
        (
            lambda folder: edit(folder / INDEX, weight_map={"x": "../elsewhere.safetensors"}),
            "has no weight_map",
        ),
        (
            lambda folder: edit(
                folder / INDEX, weight_map={"x": next(folder.glob("model-00002*")).name}
            ),
            "disagree about .* tensors",
        ),
    ],
    ids=[
        "no config",
        "no json",
        "no index",
        "no shard",
        "short shard",
        "empty map",
        "map outside",
        "map of another",
    ],
)
def test_an_incomplete_base_is_refused(
    prepare: Callable[..., LlamaForCausalLM],
    base: Path,
    refused: Callable[..., None],
    damage: Callable[[Path], None],
    message: str,
) -> None:
    prepare(shard=SHARD)
    damage(base)
    refused(CheckpointError, message)


def test_a_pickle_is_refused(
    prepare: Callable[..., LlamaForCausalLM], base: Path, refused: Callable[..., None]
) -> None:
    prepare()
    (base / SINGLE).rename(base / "pytorch_model.bin")
    refused(CheckpointError, "pytorch_model.bin is a pickle")
