"""A budget made on the meta device agrees with what the real model, optimiser and file then cost."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lora_core import Identity, LoraConfig, inject, plan_targets, save_adapter, trained_weights
from lora_core.budget import full_budget, lora_budget

Build = Callable[..., LlamaForCausalLM]
CONFIGS = [LoraConfig(r=16, lora_alpha=32), LoraConfig(r=16, lora_alpha=32, target_modules=("q_proj", "up_proj"))]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=["all", "some"])


@pytest.fixture
def meta(build_llama: Build) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(build_llama().config)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@each_config
def test_weights_and_file_are_what_training_and_saving_give(
    build_llama: Build, meta: LlamaForCausalLM, tmp_path: Path, config: LoraConfig
) -> None:
    budget = lora_budget(meta, plan_targets(meta, config), quantized=False, tokens=64, shards=1)
    model = build_llama()
    inject(model, config, seed=0)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert budget.trained_weights == trained_weights(model)
    # The values are exact; only the header, a few per cent even of so small a file, is an estimate.
    assert abs(budget.file_bytes - size) < 0.05 * size
    assert budget.base_bytes == bytes_of(model.parameters())
    assert budget.gradient_bytes == bytes_of(p for p in model.parameters() if p.requires_grad)


@each_config
def test_a_quantised_base_costs_what_it_holds(build_nf4_llama: Build, meta: LlamaForCausalLM, config: LoraConfig) -> None:
    """Quantisation takes every linear layer but the head, adapted or not."""
    budget = lora_budget(meta, plan_targets(meta, config), quantized=True, tokens=64, shards=1)
    model = build_nf4_llama()
    state = model.state_dict()
    scales = sum(bytes_of([value]) for name, value in state.items() if name.endswith((".absmax", ".nested_absmax")))
    held = bytes_of(model.parameters()) + scales
    inject(model, config, seed=0)
    # A layer of 64×64 has one float of second scales for fewer than the 256 blocks that share one in a large layer.
    assert abs(budget.base_bytes - held - 4 * trained_weights(model)) < 0.02 * held


def test_full_fine_tuning_trains_everything(build_llama: Build, meta: LlamaForCausalLM) -> None:
    budget, model = full_budget(meta, tokens=64, shards=1), build_llama()
    assert budget.trained_weights == trained_weights(model)
    assert budget.base_bytes == budget.gradient_bytes == budget.file_bytes == bytes_of(model.parameters())


def test_the_optimiser_is_shared_between_processes(meta: LlamaForCausalLM) -> None:
    one, four = (full_budget(meta, tokens=64, shards=shards) for shards in (1, 4))
    assert one.optimizer_bytes // 4 == four.optimizer_bytes
    assert one.base_bytes == four.base_bytes


def test_activations_grow_with_the_tokens(meta: LlamaForCausalLM) -> None:
    few, many = (full_budget(meta, tokens=tokens, shards=1).activation_bytes for tokens in (64, 640))
    assert few > 0
    assert abs(many - 10 * few) < 10  # each is rounded down to whole bytes


def test_memory_is_the_sum_of_its_parts(meta: LlamaForCausalLM) -> None:
    budget = full_budget(meta, tokens=64, shards=2)
    parts = (budget.base_bytes, budget.gradient_bytes, budget.optimizer_bytes, budget.activation_bytes)
    assert budget.memory_bytes == sum(parts)


def test_a_budget_does_not_depend_on_the_device(build_llama: Build, meta: LlamaForCausalLM) -> None:
    budgets = [lora_budget(m, plan_targets(m, CONFIGS[0]), quantized=True, tokens=8, shards=2) for m in (meta, build_llama())]
    assert budgets[0] == budgets[1]
    assert {p.device.type for p in meta.parameters()} == {"meta"}
