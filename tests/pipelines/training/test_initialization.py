"""An adapter is initialized from the first examples of its run, or from the files of the base."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lora_core import LoraConfig, lora_layers
from lora_core.calibration.eva import eva_initialization
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


def test_eva_reads_the_first_tokens_of_the_run(
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
    assert len(read) == 4  # three examples of twelve tokens are enough; the model skips the fourth
    layers = dict(lora_layers(model))
    batches = list(calibration_batches(base, EXAMPLES[:3]))
    expected = eva_initialization(base, dict.fromkeys(layers, 4), batches)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A, expected[name])
        assert not layer.lora_B.any()


def test_loftq_reads_the_files_of_the_base(model: PreTrainedModel, tiny_folder: Path) -> None:
    inject_initialized(model, config("loftq"), seed=1, examples=[], base=tiny_folder)
    weights = load_file(str(tiny_folder / "model.safetensors"))
    for name, layer in lora_layers(model):
        error = weights[f"{name}.weight"].double() - layer.frozen.dense(torch.float32).double()
        remaining = (error - layer.delta().double()).norm().item()
        smallest = torch.linalg.svdvals(error)[4:].norm().item()
        assert remaining == pytest.approx(smallest, rel=1e-5)


def test_a_missing_weight_is_named(tiny_folder: Path) -> None:
    with (
        full_precision_weights(tiny_folder) as weight,
        pytest.raises(BaseModelError, match=r"has no layers\.0\.q_proj\.weight"),
    ):
        weight("layers.0.q_proj")


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "pissa_niter_2", "olora"])
def test_other_initializations_read_neither(model: PreTrainedModel, init: str) -> None:
    def none() -> Iterator[dict[str, Any]]:
        raise AssertionError("an example was read")
        yield

    inject_initialized(model, config(init), seed=1, examples=none(), base=Path("nowhere"))
    assert len(list(lora_layers(model))) == 14
