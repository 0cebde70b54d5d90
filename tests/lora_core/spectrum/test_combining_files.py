"""A combination of adapter files is the sum that PEFT computes and loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from combined_updates import relative, weighted_sum
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    Identity,
    LoraConfig,
    inject,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lora_core.spectrum.combining import combine
from lora_core.spectrum.derived_adapter import write_updates
from lora_core.spectrum.updates import read_over_one_base

Build = Callable[..., LlamaForCausalLM]
Save = Callable[..., Path]
WEIGHTS = [0.7, -0.4]
# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def save(build_llama: Build, tmp_path: Path) -> Save:
    """Save adapters of one base, with noise in B."""

    def make(name: str, *targets: str, rank: int, rslora: bool = False, seed: int = 0) -> Path:
        model = build_llama()
        config = LoraConfig(r=rank, lora_alpha=6, target_modules=targets, use_rslora=rslora)
        inject(model, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _, layer in lora_layers(model):
            layer.lora_B.data.normal_(std=0.2, generator=generator)
        save_adapter(model, tmp_path / name, config, Identity(base="tiny llama"))
        return tmp_path / name

    return make


@pytest.fixture
def in_peft(build_llama: Build) -> Callable[..., PeftModel]:
    """Load several adapters into one PEFT model."""

    def load(*folders: Path) -> PeftModel:
        model = PeftModel.from_pretrained(build_llama(), folders[0], adapter_name=folders[0].name)
        for folder in folders[1:]:
            model.load_adapter(folder, adapter_name=folder.name)
        return model

    return load


def deltas(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A:
            found[name] = module.get_delta_weight(adapter)
    return found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "cat"}, {"combination_type": "cat"}),
        ({"method": "svd", "rank": 3}, {"combination_type": "svd", "svd_rank": 3}),
        (
            {"method": "ties", "rank": 5, "density": 0.25},
            {"combination_type": "ties_svd", "svd_rank": 5, "density": 0.25},
        ),
    ],
    ids=["cat", "svd", "ties"],
)
def test_sum_agrees_with_peft(
    save: Save, in_peft: Callable[..., PeftModel], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Only with alpha/r, for which PEFT's scale is right.

    For TIES the weights are equal: PEFT elects signs before weighting, this library after.
    """
    folders = [
        save("one", "q_proj", "up_proj", rank=4, seed=1),
        save("two", "q_proj", "down_proj", rank=2, seed=2),
    ]
    weights = [0.5, 0.5] if ours["method"] == "ties" else WEIGHTS
    found = combine(read_over_one_base(folders), weights, **ours).updates
    model = in_peft(*folders)
    model.add_weighted_adapter(["one", "two"], weights, "both", **theirs)
    expected = deltas(model, "both")
    assert found.keys() == expected.keys()
    for name, update in found.items():
        # Both truncate the same matrix, in float32 or float64: the gap between kept and lost
        # values amplifies 6e-8.
        assert relative(update.dense(), expected[name]) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_written_combination_is_the_sum_of_what_peft_loads(
    save: Save, in_peft: Callable[..., PeftModel], tmp_path: Path, rslora: bool
) -> None:
    """Also with alpha/√r, for which PEFT's sum is too large by the root of the new rank.

    The ranks differ.
    """
    folders = [
        save("one", "q_proj", "up_proj", rank=4, rslora=rslora, seed=1),
        save("two", "q_proj", "down_proj", rank=2, rslora=rslora, seed=2),
    ]
    result = combine(read_over_one_base(folders), WEIGHTS, method="cat")
    write_updates(
        tmp_path / "both",
        result.updates,
        like=folders[0],
        derived_by="one · 0.7 and two · -0.4 by cat",
        parents=folders,
    )
    model = in_peft(*folders, tmp_path / "both")
    one, two, both = (deltas(model, name) for name in ("one", "two", "both"))
    assert both.keys() == one.keys() | two.keys()
    for name, found in both.items():
        expected = torch.zeros_like(found)
        for weight, each in zip(WEIGHTS, (one, two), strict=True):
            if name in each:
                expected += weight * each[name]
        assert relative(found, expected) < 1e-6


def test_written_combination_loads_into_a_model(
    save: Save, build_llama: Build, tmp_path: Path
) -> None:
    folders = [
        save("one", "q_proj", "up_proj", rank=4, rslora=True, seed=1),
        save("two", "q_proj", "down_proj", rank=4, seed=2),
    ]
    read = read_over_one_base(folders)
    result = combine(read, WEIGHTS, method="svd", rank=4)
    folder = tmp_path / "both"
    write_updates(folder, result.updates, like=folders[0], derived_by="a sum", parents=folders)
    model = build_llama()
    load_adapter(model, folder)
    layers: dict[str, nn.Module] = dict(lora_layers(model))
    assert sorted(layers) == sorted(result.updates)
    for name, layer in layers.items():
        exact = torch.zeros(1, dtype=torch.float64)
        for updates, weight in zip(read, WEIGHTS, strict=True):
            if name in updates:
                exact = exact + weighted_sum([updates[name]], [weight])
        error = relative(layer.delta(), exact)
        assert error == pytest.approx(result.relative_errors[name], abs=1e-6)
