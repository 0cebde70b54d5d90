"""What a start is found from in a run: its first examples, and the base's own files, a weight at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lora_core import LoraConfig, lora_layers
from lora_core.calibration.eva import eva_starts
from pipelines.errors import BaseModelError
from pipelines.models.hardware import detect
from pipelines.models.loading import load_model
from pipelines.training import initialization
from pipelines.training.initialization import (
    calibration_batches,
    full_precision_weights,
    inject_initialized,
)

EXAMPLES = [
    {"input_ids": list(range(3 + k, 15 + k)), "supervised": [False] * 6 + [True] * 6}
    for k in range(20)
]


def config(init: str) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, init_lora_weights=init)


@pytest.fixture
def model(tiny_folder: Path) -> PreTrainedModel:
    return load_model(tiny_folder, "nf4", detect())


def test_an_eva_start_is_found_from_the_first_tokens_of_the_run(
    model: PreTrainedModel, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialization, "EVA_TOKENS", 30)
    read: list[Any] = []

    def examples() -> Iterator[dict[str, Any]]:
        for example in EXAMPLES:
            read.append(example)
            yield example

    base = load_model(tiny_folder, "nf4", detect())
    inject_initialized(model, config("eva"), seed=1, examples=examples(), base=Path("nowhere"))
    assert len(read) == 4  # three of twelve tokens are enough, and the next one is not pushed
    layers = dict(lora_layers(model))
    expected = eva_starts(
        base, dict.fromkeys(layers, 4), list(calibration_batches(base, EXAMPLES[:3]))
    )
    assert all(
        torch.equal(layer.lora_A, expected[name]) and not layer.lora_B.any()
        for name, layer in layers.items()
    )


def test_a_loftq_start_is_found_from_the_files_of_the_base(
    model: PreTrainedModel, tiny_folder: Path
) -> None:
    inject_initialized(model, config("loftq"), seed=1, examples=[], base=tiny_folder)
    weights = load_file(str(tiny_folder / "model.safetensors"))
    for name, layer in lora_layers(model):
        error = weights[f"{name}.weight"].double() - layer.frozen.dense(torch.float32).double()
        left = (error - layer.delta().double()).norm().item()
        assert left == pytest.approx(torch.linalg.svdvals(error)[4:].norm().item(), rel=1e-5)


def test_a_weight_under_another_name_is_asked_for(tiny_folder: Path) -> None:
    with (
        full_precision_weights(tiny_folder) as weight,
        pytest.raises(BaseModelError, match=r"holds no layers\.0\.q_proj\.weight"),
    ):
        weight("layers.0.q_proj")


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "pissa_niter_2", "olora"])
def test_other_starts_read_neither(model: PreTrainedModel, init: str) -> None:
    def none() -> Iterator[dict[str, Any]]:
        raise AssertionError("an example was read")
        yield

    inject_initialized(model, config(init), seed=1, examples=none(), base=Path("nowhere"))
    assert len(list(lora_layers(model))) == 14
