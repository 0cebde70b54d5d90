"""The plan's memory beside the peaks that were measured on a CPU, and what it reads from data and launch configs."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lora_core import Identity, LoraConfig, inject, plan_targets, save_adapter, trained_weights
from lora_core.adapter.adapter_files import read_json
from lora_core.budget.budget import budget
from lora_core.budget.setup import Setup
from lora_core.errors import ConfigError, TargetError
from lora_core.training.optim import loraplus_groups
from pipelines.config.sections import LoraSection
from pipelines.errors import BaseModelError, RecipeError
from pipelines.planning.examples import Examples
from pipelines.planning.fitting import what_would_fit
from pipelines.planning.plan import check_ratio, cpu_setup, gpu_setup, lora_config, plan
from pipelines.runtime.sharding import sharding

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


@pytest.mark.parametrize(
    ("label", "rank", "setup", "peak"), MEASURED, ids=[label for label, *_ in MEASURED]
)
def test_the_peak_is_foreseen_within_ten_per_cent(
    smollm2: LlamaForCausalLM, label: str, rank: int, setup: Setup, peak: int
) -> None:
    way = cpu_setup(setup if rank else replace(setup, method="full"))
    targets = plan_targets(smollm2, LoraConfig(r=rank, lora_alpha=32)) if rank else []
    assert budget(smollm2, way, targets).memory_bytes == pytest.approx(peak, rel=0.1)


def test_a_gpu_computes_in_copies_of_half_the_bytes_next_to_float32_masters(
    smollm2: LlamaForCausalLM,
) -> None:
    full = Setup("full", tokens=703)
    on_cpu, on_gpu = (budget(smollm2, setup) for setup in (cpu_setup(full), gpu_setup(full)))
    norms = 576 * (
        2 * 30 + 1
    )  # everything else lies in linear layers, the head tied to the embedding among them
    assert on_gpu.weight_bytes == on_cpu.weight_bytes + 2 * (smollm2.num_parameters() - norms)
    assert (on_gpu.gradient_bytes, on_gpu.optimizer_bytes) == (
        on_cpu.gradient_bytes,
        on_cpu.optimizer_bytes,
    )
    assert on_gpu.file_bytes == on_cpu.file_bytes == 4 * smollm2.num_parameters()


def test_an_engine_on_gpus_has_masters_of_its_own(smollm2: LlamaForCausalLM) -> None:
    sharded = gpu_setup(Setup("full", tokens=703, sharding="zero2", processes=2))
    cost = budget(smollm2, sharded)
    assert cost.weight_bytes == 2 * smollm2.num_parameters()
    assert cost.optimizer_bytes == 3 * 4 * smollm2.num_parameters() // 2


def test_the_largest_share_is_what_the_fullest_process_gets(tmp_path: Path) -> None:
    lengths = [10, 20, 30, 40]
    rows = {
        "input_ids": [[1] * n for n in lengths],
        "supervised": [[False] * (n - 2) + [True] * 2 for n in lengths],
    }
    Dataset.from_dict(rows).save_to_disk(tmp_path / "train")
    inputs = {
        "training": {"steps": 2, "batch_size": 4, "gradient_accumulation_steps": 1},
        "seed": 7,
        "processes": 2,
    }
    examples = Examples.read(tmp_path)
    # Dealt out longest first: 40 + 10 and 30 + 20 tokens, two examples with two supervised tokens each.
    assert examples.largest_share(inputs) == {"tokens": 50, "supervised": 4}
    assert examples.largest_share({**inputs, "processes": 1}) == {"tokens": 100, "supervised": 8}
    assert examples.tokens_of_a_step(inputs) == 100
    # Cut at 25: 10, 20, 25 and 25, of which the first two keep their supervised tokens.
    assert examples.cut(25).largest_share(inputs) == {"tokens": 45, "supervised": 2}


# --- what a recipe's adapter will be ---


@pytest.fixture
def planned(tiny_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a maker of the plan of a lora section on the tiny model and four examples."""
    rows = {"input_ids": [[1] * 20] * 4, "supervised": [[False] * 10 + [True] * 10] * 4}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "train")

    def make(
        config: str = "cpu_single", processes: int = 1, quantization: str = "nf4", **lora: Any
    ) -> dict[str, Any]:
        checkpointing = lora.pop("gradient_checkpointing", False)
        section = LoraSection(**{"ranks": (4,), "alpha": 8, **lora})
        training = {
            "steps": 2,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": checkpointing,
        }
        inputs = {
            "ranks": list(section.ranks),
            "lora": section.model_dump(mode="json"),
            "quantization": quantization,
            "training": training,
            "processes": processes,
            "seed": 7,
        }
        return plan(
            tmp_path, inputs | sharding(config), {"base": str(tiny_folder), "data": str(tmp_path)}
        )[0]

    return make


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"init": "pissa"},
        {"init": "pissa_niter_4", "dropout": 0.1},
        {"init": "olora", "use_rslora": True},
    ],
    ids=str,
)
def test_a_plan_foresees_the_weights_and_the_file(
    planned: Callable[..., dict[str, Any]], tiny_folder: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    """A start from the weight doubles the rank of the file and not what is trained."""
    found = planned(**lora)
    run, model = found["runs"]["rank-4"], LlamaForCausalLM.from_pretrained(tiny_folder)
    config = lora_config(LoraSection(ranks=(4,), alpha=8, **lora).model_dump(mode="json"), 4)
    inject(model, config, seed=0)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    written, size = (
        read_json(tmp_path / "adapter" / "adapter_config.json"),
        (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size,
    )
    assert (
        run["trained_weights"]
        == sum(kind["trained_weights"] for kind in found["targets"])
        == trained_weights(model)
    )
    assert run["file_rank"] == written["r"] == (4 if "init" not in lora else 8)
    assert run["scale"] == pytest.approx(8 / (2 if lora.get("use_rslora") else 4))
    assert run["file_bytes"] == pytest.approx(size, rel=0.05)  # the header is an estimate


def test_the_weights_of_each_target_count_the_lengths_that_dora_trains(
    planned: Callable[..., dict[str, Any]], tiny_folder: Path
) -> None:
    model, lora = LlamaForCausalLM.from_pretrained(tiny_folder), {"use_dora": True}
    inject(
        model,
        lora_config(LoraSection(ranks=(4,), alpha=8, **lora).model_dump(mode="json"), 4),
        seed=0,
    )
    assert sum(kind["trained_weights"] for kind in planned(**lora)["targets"]) == trained_weights(
        model
    )


def test_a_plan_holds_a_start_that_is_taken_off_again(
    planned: Callable[..., dict[str, Any]],
) -> None:
    plain, doubled = (planned(init=init)["runs"]["rank-4"] for init in ("kaiming", "pissa"))
    assert doubled["weight_bytes"] - plain["weight_bytes"] == 4 * plain["trained_weights"]
    assert doubled["memory_bytes"] > plain["memory_bytes"]
    assert (
        doubled["other_checkpointing_bytes"] - plain["other_checkpointing_bytes"]
        == 4 * plain["trained_weights"]
    )


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        (
            {"ranks": (17,), "init": "pissa"},
            TargetError,
            "'pissa' doubles the rank of the saved adapter, and twice 17 exceeds",
        ),
        ({"ranks": (3,), "init": "orthogonal"}, ConfigError, "use even ranks"),
        (
            {"target_modules": ("embed_tokens",), "dropout": 0.1},
            TargetError,
            "lora_dropout=0.1 has no effect",
        ),
        (
            {"target_modules": ("embed_tokens",), "loraplus_ratio": 4},
            RecipeError,
            "lora.loraplus_ratio 4 has no effect",
        ),
        (
            {"target_modules": ("embed_tokens", "q_proj"), "init": "eva"},
            TargetError,
            "'eva' has no effect on model.embed_tokens",
        ),
        (
            {"exclude_modules": ("down_proj", "up_prjo")},
            TargetError,
            "exclude_modules names 'up_prjo'",
        ),
    ],
)
def test_a_plan_refuses_what_training_would_or_would_ignore(
    planned: Callable[..., dict[str, Any]],
    lora: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        planned(**lora)


def test_a_ratio_acts_on_the_lengths_of_an_adapted_embedding(tiny_folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    lora = LoraSection(
        ranks=(4,), target_modules=("embed_tokens",), loraplus_ratio=4, use_dora=True
    ).model_dump(mode="json")
    check_ratio(lora, plan_targets(model, lora_config(lora, 4)))
    inject(model, lora_config(lora, 4), seed=0)
    groups = loraplus_groups(model.named_parameters(), learning_rate=0.1, ratio=4)
    assert {group["lr"] for group in groups} == {0.1, 0.4}


# --- what would need less, and what goes over the wire ---


def test_a_plan_names_single_changes_that_need_less(planned: Callable[..., dict[str, Any]]) -> None:
    """Each is measured by a plan of a recipe that has it."""
    run = planned(config="gpu_ddp")["runs"]["rank-4"]
    less = {way["setting"]: way for way in run["less"]}
    assert set(less) == {
        "training.gradient_checkpointing",
        "training.gradient_accumulation_steps",
        "data.max_tokens",
    }
    assert (
        less["training.gradient_checkpointing"]["memory_bytes"] == run["other_checkpointing_bytes"]
    )
    assert (
        less["training.gradient_accumulation_steps"]["value"],
        less["data.max_tokens"]["value"],
    ) == (2, 10)
    assert all(way["memory_bytes"] < run["memory_bytes"] for way in run["less"])


def test_a_plan_names_launches_that_share_more(planned: Callable[..., dict[str, Any]]) -> None:
    found = planned(config="gpu_zero1", processes=2, quantization="none")["runs"]["control"]["less"]
    launches = {
        way["value"]: way["memory_bytes"] for way in found if way["setting"] == "launch.config"
    }
    assert set(launches) <= {"gpu_zero2", "gpu_zero3", "gpu_zero3_offload"}
    other = planned(config="gpu_zero2", processes=2, quantization="none")["runs"]["control"]
    assert launches["gpu_zero2"] == other["memory_bytes"]


def test_on_a_cpu_nothing_is_offloaded(planned: Callable[..., dict[str, Any]]) -> None:
    found = planned(config="cpu_zero1", processes=2)["runs"]["control"]["less"]
    assert "cpu_zero3_offload" not in {way["value"] for way in found}


def test_a_plan_says_what_ranks_send(planned: Callable[..., dict[str, Any]]) -> None:
    """Of DDP in float32 on two ranks, half of the gradient twice."""
    runs = planned(config="cpu_ddp", processes=2)["runs"]
    for run in runs.values():
        assert run["sent_bytes"] == 4 * run["trained_weights"]
    assert planned()["runs"]["control"]["sent_bytes"] == 0


def test_every_way_is_weighed_up_to_512_gpus(planned: Callable[..., dict[str, Any]]) -> None:
    found = planned()
    assert {way["processes"] for way in found["scaling"]} == {2**power for power in range(10)}
    assert found["alternatives"] == [way for way in found["scaling"] if way["processes"] <= 8]
    of_two = {
        way["sharding"]: way
        for way in found["scaling"]
        if way["method"] == "full" and way["processes"] == 2
    }
    trained = found["runs"]["control"]["trained_weights"]
    assert of_two["ddp"]["memory_bytes"] - of_two["ddp"]["eight_bit_bytes"] == pytest.approx(
        (4 - 1 - 4 / 256) * 2 * trained, abs=1
    )
    assert all(
        way["eight_bit_bytes"] == way["memory_bytes"]
        for way in found["scaling"]
        if (way["method"], way["sharding"]) != ("full", "ddp")
    )
    assert of_two["ddp"]["sent_bytes"] == 4 * trained  # gradients of float32 masters


def test_a_family_without_gradient_checkpointing_is_refused_before_anything_is_trained(
    planned: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    assert planned()["runs"]
    with pytest.raises(BaseModelError, match="'llama' does not support it"):
        planned(gradient_checkpointing=True)


def test_the_message_quotes_the_plan(planned: Callable[..., dict[str, Any]]) -> None:
    said = what_would_fit(planned(config="gpu_ddp"), "rank-4 lr 0.001")
    assert said.startswith("rank-4 was expected to need 1.07 GB in each process")
    for word in (
        "training.gradient_checkpointing: true (",
        "training.gradient_accumulation_steps: 2 (",
        "data.max_tokens: 10 (",
    ):
        assert word in said


def test_every_weight_of_the_base_is_listed_once(planned: Callable[..., dict[str, Any]]) -> None:
    """With how it is stored and whether it is adapted; the tiny model's head is tied to its embedding."""
    found = planned()
    assert (
        sum(kind["weights"] for kind in found["weights"])
        == found["runs"]["control"]["trained_weights"]
    )
    adapted = {
        kind["name"].rpartition(".")[0].rpartition(".")[2]
        for kind in found["weights"]
        if kind["adapted"]
    }
    assert adapted == {target["name"] for target in found["targets"]}
    assert all(
        kind["stored"] == ("nf4" if kind["adapted"] else "dense") for kind in found["weights"]
    )
