"""Budgets from the meta device match real models, optimizers and files, and published values."""

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
SCALE_SUFFIXES = (".absmax", ".nested_absmax")


@pytest.fixture
def meta(build_llama: Build) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(build_llama().config)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def adapted(model: LlamaForCausalLM, setup: Setup, config: LoraConfig = CONFIGS[0]) -> Budget:
    return budget(model, setup, plan_targets(model, config))


@each_config
def test_weights_and_file_size_match_training_and_saving(
    build_llama: Build, meta: LlamaForCausalLM, tmp_path: Path, config: LoraConfig
) -> None:
    cost = adapted(meta, replace(QLORA, method="lora"), config)
    model = build_llama()
    inject(model, config, seed=0)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert cost.trained_weights == trained_weights(model)
    # Only the header is an estimate: a few percent even of such a small file.
    assert abs(cost.file_bytes - size) < 0.05 * size
    assert cost.weight_bytes == bytes_of(model.parameters())
    assert cost.gradient_bytes == bytes_of(p for p in model.parameters() if p.requires_grad)


@each_config
def test_quantized_base_matches_real_memory(
    build_nf4_llama: Build, meta: LlamaForCausalLM, config: LoraConfig
) -> None:
    """Quantization applies to every linear layer except the head, adapted or not."""
    cost = adapted(meta, QLORA, config)
    model = build_nf4_llama()
    state = model.state_dict()
    scales = bytes_of(state[name] for name in state if name.endswith(SCALE_SUFFIXES))
    held = bytes_of(model.parameters())
    inject(model, config, seed=0)
    assert cost.weight_bytes - 4 * trained_weights(model) == held
    # A 64×64 layer has one float of second-level scales for fewer than the usual 256 blocks.
    assert abs(cost.quantization_bytes - scales) < 0.05 * scales


def test_full_fine_tuning_trains_all_weights(build_llama: Build, meta: LlamaForCausalLM) -> None:
    cost = budget(meta, FULL)
    model = build_llama()
    assert cost.trained_weights == trained_weights(model)
    model_bytes = bytes_of(model.parameters())
    assert cost.weight_bytes == cost.gradient_bytes == cost.file_bytes == model_bytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("sharding", "sharded"),
    [
        ("ddp", ()),
        ("zero1", ("optimizer",)),
        ("zero2", ("optimizer", "gradient")),
        ("zero3", ("optimizer", "gradient", "weight")),
    ],
)
def test_sharding_divides_its_terms(
    meta: LlamaForCausalLM, method: str, sharding: str, sharded: tuple[str, ...]
) -> None:
    one = adapted(meta, Setup(method, 64, sharding, 1))
    four = adapted(meta, Setup(method, 64, sharding, 4))
    for term in ("optimizer", "gradient", "weight"):
        before = getattr(one, f"{term}_bytes")
        after = getattr(four, f"{term}_bytes")
        shards = 4 if term in sharded else 1
        copies = 2 if term == "gradient" and sharding == "ddp" else 1  # DDP's buckets
        assert after == copies * before // shards
    assert one.activation_bytes == four.activation_bytes
    assert one.quantization_bytes == four.quantization_bytes


def test_adapter_is_float32_without_engine(
    meta: LlamaForCausalLM,
) -> None:
    ddp = adapted(meta, Setup("lora", 64, "ddp"))
    engine = adapted(meta, Setup("lora", 64, "zero2"))
    weights = ddp.trained_weights
    assert ddp.weight_bytes - engine.weight_bytes == 2 * weights
    assert ddp.optimizer_bytes == 8 * weights
    assert engine.optimizer_bytes == 12 * weights  # masters and two moments


@pytest.mark.parametrize(
    ("method", "sharding", "changes"),
    [("full", "ddp", True), ("full", "zero2", False), ("lora", "ddp", False)],
)
def test_eight_bit_optimizer_only_affects_full_fine_tuning_without_engine(
    meta: LlamaForCausalLM, method: Method, sharding: Sharding, changes: bool
) -> None:
    plain = adapted(meta, Setup(method, 64, sharding))
    eight_bit = adapted(meta, Setup(method, 64, sharding, eight_bit_optimizer=True))
    expected = plain.optimizer_bytes
    if changes:
        expected = int(2 * (1 + 4 / 256) * plain.trained_weights)
    assert eight_bit.optimizer_bytes == expected
    assert plain.memory_bytes - eight_bit.memory_bytes == plain.optimizer_bytes - expected


def test_step_without_fused_kernel_needs_more_memory(meta: LlamaForCausalLM) -> None:
    setup = replace(FULL, sharding="zero2", tokens=1)
    fused = budget(meta, setup)
    plain = budget(meta, replace(setup, fused_optimizer=False))
    assert plain.buffer_bytes >= fused.buffer_bytes


def test_memory_is_sum_of_terms(meta: LlamaForCausalLM) -> None:
    cost = adapted(meta, replace(QLORA, process_bytes=1000))
    assert cost.memory_bytes == sum(cost.terms().values())
    assert set(cost.terms()) == set(vars(cost)) - {
        "trained_weights",
        "file_bytes",
        "host_bytes",
        "loading_bytes",
        "uncounted",
    }


def test_loading_is_peak_if_mapped_checkpoint_is_largest(meta: LlamaForCausalLM) -> None:
    cost = adapted(
        meta,
        replace(QLORA, tokens=1, mapped_checkpoint=True),
        LoraConfig(r=1, lora_alpha=1, target_modules=("q_proj",)),
    )
    dense = 4 * sum(parameter.numel() for parameter in meta.parameters())
    assert cost.loading_bytes == cost.weight_bytes + cost.quantization_bytes + dense
    assert cost.memory_bytes == cost.loading_bytes


def test_budget_does_not_depend_on_device(build_llama: Build, meta: LlamaForCausalLM) -> None:
    assert adapted(meta, QLORA) == adapted(build_llama(), QLORA)
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_alternatives_are_unique_and_fit_by_memory(meta: LlamaForCausalLM) -> None:
    priced = alternatives(meta, QLORA, plan_targets(meta, CONFIGS[0]), [1, 2])
    setups = [setup for setup, _ in priced]
    assert len(set(setups)) == len(setups) == len(METHODS) * len(SHARDINGS) * 2
    _, cost = priced[0]
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
def test_invalid_setup_raises(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(QLORA, **changes)


def test_adapter_method_without_targets_raises(meta: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="plan_targets"):
        budget(meta, QLORA)


# --- experts, transposed weights, DoRA ---


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
    "transposed": (gpt2, LoraConfig(r=3, lora_alpha=6)),
    "dora": (llama, LoraConfig(r=3, lora_alpha=6, use_dora=True)),
    "dora, transposed": (gpt2, LoraConfig(r=3, lora_alpha=6, use_dora=True)),
}


@pytest.mark.filterwarnings(
    "ignore:PEFT takes model.layers.0.mlp.gate_proj:UserWarning"
)  # of a base that also has experts
@pytest.mark.parametrize(("build", "config"), CASES.values(), ids=CASES.keys())
def test_every_kind_of_weight_is_counted(
    build: Callable[[], PreTrainedModel], config: LoraConfig, tmp_path: Path
) -> None:
    model = build()
    meta = on_meta(build)
    setup = Setup("lora", tokens=64, compute_bytes=4, dora=config.use_dora)
    cost = budget(meta, setup, plan_targets(meta, config))
    inject(model, config, seed=0)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    assert cost.trained_weights == trained_weights(model)
    assert cost.weight_bytes == bytes_of(model.parameters())
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    # The header has one entry per tensor, whose length depends on the module's path.
    tolerance = 50 * len(load_file(path))
    assert abs(cost.file_bytes - path.stat().st_size) < tolerance


@pytest.mark.parametrize("build", [mixtral, deepseek_v3, gpt2])
def test_experts_stay_dense_in_quantized_base(
    build: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """bitsandbytes quantizes linear layers and Conv1D, but not stacks of experts."""
    build().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=nf4, dtype=torch.float32
    )
    meta = on_meta(build)
    cost = budget(meta, QLORA, plan_targets(meta, CONFIGS[0]))
    assert cost.weight_bytes - 4 * cost.trained_weights == bytes_of(model.parameters())
    assert cost.uncounted == ()


@pytest.mark.parametrize("row", published_rows(), ids=lambda row: row["what"])
def test_published_values(row: dict[str, object]) -> None:
    """The rows document sources and tolerances."""
    assert row["holds"], f"{row['value']} {row['unit']}, {row['goal']}"


@pytest.mark.parametrize("method", METHODS)
def test_offloaded_optimizer_is_on_host(meta: LlamaForCausalLM, method: str) -> None:
    """The host also has the gradients; except for step buffers, the rest is unchanged."""
    on_gpu = adapted(meta, Setup(method, 64, "zero3", 4))
    offloaded = adapted(meta, Setup(method, 64, "zero3_offload", 4))
    assert on_gpu.host_bytes == 0
    assert offloaded.host_bytes == on_gpu.optimizer_bytes + on_gpu.gradient_bytes > 0
    assert offloaded.optimizer_bytes == offloaded.gradient_bytes == 0
    assert offloaded.weight_bytes == on_gpu.weight_bytes
    assert offloaded.activation_bytes == on_gpu.activation_bytes
    assert offloaded.buffer_bytes <= on_gpu.buffer_bytes
