"""The plan's memory beside the peaks that were measured on a CPU, and what it reads from data and launch configs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lora_core import LoraConfig, plan_targets
from lora_core.budget.budget import budget
from lora_core.budget.setup import Setup
from pipelines.errors import RecipeError
from pipelines.plan import cpu_setup, gpu_setup, largest_share
from pipelines.sharding import sharding

RUN = Setup("qlora", tokens=703, sharding="zero2", processes=2, logit_rows=85)
"""docstrings_smollm2_cpu: the largest pack and the most supervised tokens that a process gets, as its plan stage finds."""
CHECKPOINTED = replace(RUN, logit_rows=69, checkpointing=True)
SMALL = replace(RUN, tokens=305, logit_rows=39)
MEASURED = [
    ("rank 4", 4, RUN, 2_139_418_624),
    ("rank 16", 16, RUN, 2_287_579_136),
    ("control", 0, RUN, 4_027_920_384),
    ("rank 4, gradient_checkpointing", 4, CHECKPOINTED, 1_342_259_200),
    ("control, gradient_checkpointing", 0, CHECKPOINTED, 3_215_212_544),
    ("rank 16, batch_size 4", 16, SMALL, 1_598_861_312),
    ("control, batch_size 4", 0, SMALL, 3_281_428_480),
]
"""Peak resident bytes of the larger of two ranks, torch 2.13, DeepSpeed 0.19.8, x86-64 Linux with glibc: `peak_memory_bytes`
of each training stage. The first three by `lora run pipelines/recipes/docstrings_smollm2_cpu.yaml` (15 steps), the others by
that recipe's training stage alone (`accelerate launch`, `pipelines.train`), 4 steps, with the setting that they name. Rank 0 is
the control."""


@pytest.fixture(scope="module")
def smollm2() -> LlamaForCausalLM:
    """SmolLM2-135M's shapes, on the meta device."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(("label", "rank", "setup", "peak"), MEASURED, ids=[label for label, *_ in MEASURED])
def test_the_peak_is_foreseen_within_ten_per_cent(smollm2: LlamaForCausalLM, label: str, rank: int, setup: Setup, peak: int) -> None:
    way = cpu_setup(setup if rank else replace(setup, method="full"))
    targets = plan_targets(smollm2, LoraConfig(r=rank, lora_alpha=32)) if rank else []
    assert budget(smollm2, way, targets).memory_bytes == pytest.approx(peak, rel=0.1)


def test_a_gpu_computes_in_half_the_bytes(smollm2: LlamaForCausalLM) -> None:
    full = Setup("full", tokens=703)
    on_cpu, on_gpu = (budget(smollm2, setup) for setup in (cpu_setup(full), gpu_setup(full)))
    assert on_cpu.weight_bytes == 2 * on_gpu.weight_bytes


def test_the_largest_share_is_what_the_fullest_process_gets(tmp_path: Path) -> None:
    lengths = [10, 20, 30, 40]
    rows = {"input_ids": [[1] * n for n in lengths], "supervised": [[False] * (n - 2) + [True] * 2 for n in lengths]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "train")
    inputs = {"training": {"steps": 2, "batch_size": 4, "accumulation": 1}, "seed": 7, "processes": 2}
    # Dealt out longest first: 40 + 10 and 30 + 20 tokens, two examples with two supervised tokens each.
    assert largest_share(tmp_path, inputs) == {"tokens": 50, "supervised": 4}
    assert largest_share(tmp_path, {**inputs, "processes": 1}) == {"tokens": 100, "supervised": 8}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu_single", {"device": "cpu", "sharding": "ddp"}),
        ("cpu_zero2", {"device": "cpu", "sharding": "zero2", "bucket_weights": 50_000_000}),
        ("gpu_zero2", {"device": "gpu", "sharding": "zero2", "bucket_weights": 50_000_000}),
    ],
)
def test_launch_configs_say_what_is_shared(name: str, expected: dict[str, Any]) -> None:
    assert sharding(name).items() >= expected.items()


def test_a_stage_in_accelerates_own_keys(tmp_path: Path) -> None:
    path = tmp_path / "zero3.yaml"
    path.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\n")
    assert sharding(str(path))["sharding"] == "zero3"


def test_an_engine_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tpu.yaml"
    path.write_text("distributed_type: XLA\n")
    with pytest.raises(RecipeError, match="distributed_type XLA"):
        sharding(str(path))
