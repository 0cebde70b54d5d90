"""A budget made on the meta device agrees with what the real model, optimiser and file then cost, and with published figures."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import deepseek_v3, gpt2, llama, mixtral
from parity.budget_rows import published_rows
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel

from lora_core import Identity, LoraConfig, inject, plan_targets, save_adapter, trained_weights
from lora_core.budget.budget import Budget, alternatives, budget, fits
from lora_core.budget.setup import METHODS, Method, Setup
from lora_core.budget.wire import SHARDINGS, Sharding
from lora_core.errors import ConfigError

Build = Callable[..., LlamaForCausalLM]
CONFIGS = [
    LoraConfig(r=16, lora_alpha=32),
    LoraConfig(r=16, lora_alpha=32, target_modules=("q_proj", "up_proj")),
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=["all", "some"])
FULL = Setup("full", tokens=64, compute_bytes=4)
QLORA = Setup("qlora", tokens=64, compute_bytes=4)


@pytest.fixture
def meta(build_llama: Build) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(build_llama().config)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def adapted(model: LlamaForCausalLM, setup: Setup, config: LoraConfig = CONFIGS[0]) -> Budget:
    return budget(model, setup, plan_targets(model, config))


@each_config
def test_weights_and_file_are_what_training_and_saving_give(
    build_llama: Build, meta: LlamaForCausalLM, tmp_path: Path, config: LoraConfig
) -> None:
    cost = adapted(meta, replace(QLORA, method="lora"), config)
    model = build_llama()
    inject(model, config, seed=0)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert cost.trained_weights == trained_weights(model)
    # The values are exact; only the header, a few per cent even of so small a file, is an estimate.
    assert abs(cost.file_bytes - size) < 0.05 * size
    assert cost.weight_bytes == bytes_of(model.parameters())
    assert cost.gradient_bytes == bytes_of(p for p in model.parameters() if p.requires_grad)


@each_config
def test_a_quantised_base_costs_what_it_holds(
    build_nf4_llama: Build, meta: LlamaForCausalLM, config: LoraConfig
) -> None:
    """Quantisation takes every linear layer but the head, adapted or not."""
    cost = adapted(meta, QLORA, config)
    model = build_nf4_llama()
    scales = sum(
        bytes_of([value])
        for name, value in model.state_dict().items()
        if name.endswith((".absmax", ".nested_absmax"))
    )
    held = bytes_of(model.parameters())
    inject(model, config, seed=0)
    assert cost.weight_bytes - 4 * trained_weights(model) == held
    # A layer of 64×64 has one float of second scales for fewer than the 256 blocks that share one in a large layer.
    assert abs(cost.quantization_bytes - scales) < 0.05 * scales


def test_full_fine_tuning_trains_everything(build_llama: Build, meta: LlamaForCausalLM) -> None:
    cost, model = budget(meta, FULL), build_llama()
    assert cost.trained_weights == trained_weights(model)
    assert (
        cost.weight_bytes == cost.gradient_bytes == cost.file_bytes == bytes_of(model.parameters())
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("sharding", "shared"),
    [("ddp", ""), ("zero1", "optimizer"), ("zero2", "optimizer gradient"), ("zero3", "all")],
)
def test_each_sharding_shares_what_it_says(
    meta: LlamaForCausalLM, method: str, sharding: str, shared: str
) -> None:
    one, four = (adapted(meta, Setup(method, 64, sharding, n)) for n in (1, 4))
    for term in ("optimizer", "gradient", "weight"):
        before, after = getattr(one, f"{term}_bytes"), getattr(four, f"{term}_bytes")
        parts = 4 if term in shared or shared == "all" else 1
        copies = 2 if term == "gradient" and sharding == "ddp" else 1  # DDP's buckets
        assert after == copies * before // parts
    assert one.activation_bytes == four.activation_bytes
    assert one.quantization_bytes == four.quantization_bytes


def test_an_adapter_is_cast_by_an_engine_and_left_in_float32_without_one(
    meta: LlamaForCausalLM,
) -> None:
    alone, engine = (adapted(meta, Setup("lora", 64, sharding)) for sharding in ("ddp", "zero2"))
    weights = alone.trained_weights
    assert alone.weight_bytes - engine.weight_bytes == 2 * weights
    assert alone.optimizer_bytes == 8 * weights
    assert engine.optimizer_bytes == 12 * weights  # masters beside the two moments


@pytest.mark.parametrize(
    ("method", "sharding", "changes"),
    [("full", "ddp", True), ("full", "zero2", False), ("lora", "ddp", False)],
)
def test_eight_bits_are_of_full_fine_tuning_without_an_engine(
    meta: LlamaForCausalLM, method: Method, sharding: Sharding, changes: bool
) -> None:
    plain, eight = (
        adapted(meta, Setup(method, 64, sharding, eight_bit_optimizer=on)) for on in (False, True)
    )
    expected = int(2 * (1 + 4 / 256) * plain.trained_weights) if changes else plain.optimizer_bytes
    assert eight.optimizer_bytes == expected
    assert plain.memory_bytes - eight.memory_bytes == plain.optimizer_bytes - expected


def test_a_step_without_a_fused_kernel_holds_more(meta: LlamaForCausalLM) -> None:
    fused, plain = (
        budget(meta, replace(FULL, sharding="zero2", tokens=1, fused_optimizer=f))
        for f in (True, False)
    )
    assert plain.buffer_bytes >= fused.buffer_bytes


def test_memory_is_the_sum_of_its_terms(meta: LlamaForCausalLM) -> None:
    cost = adapted(meta, replace(QLORA, process_bytes=1000))
    assert cost.memory_bytes == sum(cost.terms().values())
    assert set(cost.terms()) == set(vars(cost)) - {
        "trained_weights",
        "file_bytes",
        "host_bytes",
        "loading_bytes",
        "uncounted",
    }


def test_where_the_checkpoint_is_mapped_loading_can_be_the_peak(meta: LlamaForCausalLM) -> None:
    cost = adapted(
        meta,
        replace(QLORA, tokens=1, mapped_checkpoint=True),
        LoraConfig(r=1, lora_alpha=1, target_modules=("q_proj",)),
    )
    dense = 4 * sum(parameter.numel() for parameter in meta.parameters())
    assert (
        cost.loading_bytes
        == cost.weight_bytes + cost.quantization_bytes + dense
        == cost.memory_bytes
    )


def test_a_budget_does_not_depend_on_the_device(build_llama: Build, meta: LlamaForCausalLM) -> None:
    assert adapted(meta, QLORA) == adapted(build_llama(), QLORA)
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_every_way_is_weighed_once_and_fits_by_its_sum(meta: LlamaForCausalLM) -> None:
    ways = alternatives(meta, QLORA, plan_targets(meta, CONFIGS[0]), [1, 2])
    assert len({way for way, _ in ways}) == len(ways) == len(METHODS) * len(SHARDINGS) * 2
    cost = ways[0][1]
    assert fits(cost, cost.memory_bytes)
    assert not fits(cost, cost.memory_bytes - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dora"}, "methods are full, lora, qlora"),
        ({"sharding": "zero4"}, "shardings ddp, zero1"),
        ({"compute_bytes": 1}, "give 2 for bfloat16"),
        ({"tokens": 0}, "tokens is 0; it must be at least 1"),
        ({"processes": 0}, "processes is 0"),
    ],
)
def test_a_setup_refuses_what_breaks_its_rules(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(QLORA, **changes)


def test_adapters_without_targets_are_refused(meta: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="plan_targets"):
        budget(meta, QLORA)


# --- experts, turned weights, DoRA ---


def on_meta(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.device("meta"):
        return build()


ON_EXPERTS = LoraConfig(
    r=3,
    lora_alpha=6,
    target_modules=("q_proj",),
    target_parameters=("experts.gate_up_proj", "experts.down_proj"),
)
CASES: dict[str, tuple[Callable[[], PreTrainedModel], LoraConfig]] = {
    "experts": (mixtral, ON_EXPERTS),
    "experts and latent attention": (
        deepseek_v3,
        LoraConfig(r=3, lora_alpha=6, target_parameters=("experts.down_proj",)),
    ),
    "turned": (gpt2, LoraConfig(r=3, lora_alpha=6)),
    "dora": (llama, LoraConfig(r=3, lora_alpha=6, use_dora=True)),
    "dora, turned": (gpt2, LoraConfig(r=3, lora_alpha=6, use_dora=True)),
}


@pytest.mark.filterwarnings(
    "ignore:PEFT takes model.layers.0.mlp.gate_proj:UserWarning"
)  # of a base with experts besides
@pytest.mark.parametrize(("build", "config"), CASES.values(), ids=CASES.keys())
def test_every_kind_of_weight_is_counted(
    build: Callable[[], PreTrainedModel], config: LoraConfig, tmp_path: Path
) -> None:
    model, setup = build(), Setup("lora", tokens=64, compute_bytes=4, dora=config.use_dora)
    cost = budget(empty := on_meta(build), setup, plan_targets(empty, config))
    inject(model, config, seed=0)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    assert cost.trained_weights == trained_weights(model)
    assert cost.weight_bytes == bytes_of(model.parameters())
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    tensors = len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert (
        abs(cost.file_bytes - size) < 50 * tensors
    )  # a name in the header is as long as its module's path


@pytest.mark.parametrize("build", [mixtral, deepseek_v3, gpt2])
def test_experts_stay_dense_in_a_quantised_base(
    build: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """bitsandbytes takes linear layers and Conv1D, and no stack of experts."""
    build().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=nf4, dtype=torch.float32
    )
    empty = on_meta(build)
    targets = plan_targets(empty, CONFIGS[0])
    cost = budget(empty, QLORA, targets)
    assert cost.weight_bytes - 4 * cost.trained_weights == bytes_of(model.parameters())
    assert cost.uncounted == ()


@pytest.mark.parametrize("row", published_rows(), ids=lambda row: row["what"])
def test_published_figures(row: dict[str, object]) -> None:
    """Sources and reasons for the tolerances stand beside the rows."""
    assert row["holds"], f"{row['value']} {row['unit']}, {row['goal']}"


@pytest.mark.parametrize("method", METHODS)
def test_an_offloaded_optimiser_lies_on_the_host(meta: LlamaForCausalLM, method: str) -> None:
    """With the gradients that it takes; of the rest nothing changes but what its step would hold."""
    here, there = (
        adapted(meta, Setup(method, 64, sharding, 4)) for sharding in ("zero3", "zero3_offload")
    )
    assert there.host_bytes == here.optimizer_bytes + here.gradient_bytes > 0 == here.host_bytes
    assert there.optimizer_bytes == there.gradient_bytes == 0
    assert (there.weight_bytes, there.activation_bytes) == (
        here.weight_bytes,
        here.activation_bytes,
    )
    assert there.buffer_bytes <= here.buffer_bytes
