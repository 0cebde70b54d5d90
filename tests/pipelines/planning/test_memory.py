"""The planned memory is close to the peaks measured on a CPU; GPUs compute in bfloat16."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_core import LoraConfig, plan_targets
from lora_core.budget.budget import budget
from lora_core.budget.setup import Setup
from pipelines.planning.plan import cpu_setup, gpu_setup

RUN = Setup("qlora", tokens=703, sharding="zero2", processes=2, logit_rows=85)
"""docstrings_smollm2_cpu: the largest micro-batch and the most supervised tokens of a process, as
computed by its plan stage."""
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
"""Peak resident bytes of the larger of two ranks, torch 2.13, DeepSpeed 0.19.8, x86-64 Linux with
glibc: `peak_memory_bytes` of each training stage. The first three by
`lora run pipelines/recipes/docstrings_smollm2_cpu.yaml` (15 steps), the others by that recipe's
training stage alone (`accelerate launch`, `pipelines.training.train`), 4 steps, with the given
setting. Rank 0 is the control."""


@pytest.fixture(scope="module")
def smollm2() -> LlamaForCausalLM:
    """Return a model with SmolLM2-135M's shapes on the meta device."""
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


@pytest.mark.parametrize(
    ("label", "rank", "setup", "peak"), MEASURED, ids=[label for label, *_ in MEASURED]
)
def test_the_planned_peak_is_within_ten_percent_of_the_measured_one(
    smollm2: LlamaForCausalLM, label: str, rank: int, setup: Setup, peak: int
) -> None:
    targets = []
    if rank == 0:
        setup = replace(setup, method="full")
    else:
        targets = plan_targets(smollm2, LoraConfig(r=rank, lora_alpha=32))
    planned = budget(smollm2, cpu_setup(setup), targets)
    assert planned.memory_bytes == pytest.approx(peak, rel=0.1)


def test_a_gpu_computes_in_bfloat16_copies_of_float32_masters(smollm2: LlamaForCausalLM) -> None:
    full = Setup("full", tokens=703)
    on_cpu = budget(smollm2, cpu_setup(full))
    on_gpu = budget(smollm2, gpu_setup(full))
    # All other weights are in linear layers, including the head, which is tied to the embedding.
    norms = 576 * (2 * 30 + 1)
    copies = 2 * (smollm2.num_parameters() - norms)
    assert on_gpu.weight_bytes == on_cpu.weight_bytes + copies
    assert on_gpu.gradient_bytes == on_cpu.gradient_bytes
    assert on_gpu.optimizer_bytes == on_cpu.optimizer_bytes
    assert on_gpu.file_bytes == on_cpu.file_bytes == 4 * smollm2.num_parameters()


def test_an_engine_on_gpus_keeps_masters_in_the_optimizer(smollm2: LlamaForCausalLM) -> None:
    sharded = gpu_setup(Setup("full", tokens=703, sharding="zero2", processes=2))
    cost = budget(smollm2, sharded)
    assert cost.weight_bytes == 2 * smollm2.num_parameters()
    assert cost.optimizer_bytes == 3 * 4 * smollm2.num_parameters() // 2
