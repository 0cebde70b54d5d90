"""A plan predicts the adapter that training writes, and rejects what training would reject."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from lora_core import Identity, inject, plan_targets, save_adapter, trained_weights
from lora_core.adapter.json_files import read_json
from lora_core.errors import ConfigError, TargetError
from lora_core.training.optim import loraplus_groups
from pipelines.config.sections import LoraSection
from pipelines.errors import BaseModelError, RecipeError
from pipelines.planning.plan import check_loraplus_ratio, lora_config
from pipelines.runtime.interfaces.plan_result import PlanResult

Planned = Callable[..., PlanResult]


def lora_settings(**changes: Any) -> LoraSection:
    return LoraSection(**{"ranks": (4,), "alpha": 8, **changes})


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
def test_a_plan_predicts_the_weights_and_the_file(
    planned: Planned, tiny_folder: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    """A spectral initialization doubles the rank in the file, and not the trained weights."""
    result = planned(**lora)
    run = result.runs["rank-4"]
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    config = lora_config(lora_settings(**lora), 4)
    inject(model, config, seed=0)
    adapter = tmp_path / "adapter"
    save_adapter(model, adapter, config, Identity())
    assert run.trained_weights == trained_weights(model)
    assert run.trained_weights == sum(kind.trained_weights for kind in result.targets)
    file_rank = 8 if "init" in lora else 4
    assert run.adapter is not None
    assert run.adapter.rank == 4
    assert run.adapter.file_rank == file_rank
    assert read_json(adapter / "adapter_config.json")["r"] == file_rank
    assert run.adapter.scale == pytest.approx(8 / (2 if lora.get("use_rslora") else 4))
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert run.file_bytes == pytest.approx(size, rel=0.05)  # the header is an estimate


def test_the_weights_of_each_target_include_dora_magnitudes(
    planned: Planned, tiny_folder: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    inject(model, lora_config(lora_settings(use_dora=True), 4), seed=0)
    targets = planned(use_dora=True).targets
    assert sum(kind.trained_weights for kind in targets) == trained_weights(model)


def test_a_plan_includes_the_memory_of_a_spectral_initialization(planned: Planned) -> None:
    plain = planned(init="kaiming").runs["rank-4"]
    spectral = planned(init="pissa").runs["rank-4"]
    extra = 4 * plain.trained_weights
    assert spectral.weight_bytes - plain.weight_bytes == extra
    assert spectral.memory_bytes > plain.memory_bytes
    assert spectral.other_checkpointing_bytes - plain.other_checkpointing_bytes == extra


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
def test_a_plan_rejects_what_training_would_reject_or_ignore(
    planned: Planned, lora: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        planned(**lora)


def test_a_loraplus_ratio_affects_the_dora_magnitudes_of_an_embedding(tiny_folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    lora = lora_settings(target_modules=("embed_tokens",), loraplus_ratio=4, use_dora=True)
    config = lora_config(lora, 4)
    check_loraplus_ratio(lora, plan_targets(model, config))
    inject(model, config, seed=0)
    groups = loraplus_groups(model.named_parameters(), learning_rate=0.1, ratio=4)
    assert {group["lr"] for group in groups} == {0.1, 0.4}


def test_a_model_without_gradient_checkpointing_is_rejected_before_training(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    assert planned().runs
    with pytest.raises(BaseModelError, match="'llama' does not support it"):
        planned(gradient_checkpointing=True)


def test_every_weight_of_the_base_is_listed_once(planned: Planned) -> None:
    """The head of the tiny model is tied to its embedding, and counted once."""
    result = planned()
    total = sum(kind.weights for kind in result.weights)
    assert total == result.runs["control"].trained_weights
    adapted = set()
    for kind in result.weights:
        assert kind.stored == ("nf4" if kind.adapted else "dense")
        if kind.adapted:
            adapted.add(kind.name.split(".")[-2])
    assert adapted == {target.name for target in result.targets}


def test_a_plan_is_the_same_after_it_is_stored(planned: Planned) -> None:
    result = planned(config="gpu_ddp", quantization="none")
    assert PlanResult.model_validate_json(json.dumps(result.plain())) == result
