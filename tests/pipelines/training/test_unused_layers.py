"""An adapted layer that the model does not use stops a training before its first step."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families.configs import tiny_config
from families.measure import built, drawn
from torch import nn
from transformers import PreTrainedModel

from lora_core import LoraConfig, TargetError, inject
from pipelines.config.sections import LoraSettings, OptimizationSettings
from pipelines.models.hardware import Hardware
from pipelines.models.measurement import Probe
from pipelines.models.packs import pack
from pipelines.models.verification_cache import VerificationCache
from pipelines.runtime.interfaces.inputs import AdapterInputs, TrainInputs
from pipelines.training.phase_timer import PhaseTimer, clock_of
from pipelines.training.verification import verify_reader

CPU = Hardware("cpu", torch.float32, "gloo")


@dataclass
class Examples:
    """The parts of a run that the verification reads."""

    accelerator: Accelerator
    timer: PhaseTimer

    def probes(self) -> list[Probe]:
        return [Probe(pack(drawn(), "cpu"), gradient=True)]


@pytest.fixture
def run() -> Iterator[Examples]:
    yield Examples(Accelerator(cpu=True), PhaseTimer(None, clock_of(torch.device("cpu"))))
    AcceleratorState._reset_state(reset_partial_state=True)


def inputs(*, full: bool = False) -> TrainInputs:
    adapter = AdapterInputs(
        rank=2,
        lora=LoraSettings(),
        base_id="tiny",
        base_revision="",
        tokenizer_sha256="",
        template_sha256="",
    )
    return TrainInputs(
        base_digests={"dense": "0"},
        data_digest="0",
        quantization="none",
        learning_rate=1e-4,
        training=OptimizationSettings(steps=1),
        seed=0,
        adapter=None if full else adapter,
    )


def model_with_a_spare_layer() -> PreTrainedModel:
    model = built(tiny_config("llama"))
    model.model.layers[1].spare_proj = nn.Linear(4, 4)
    return model


def test_training_of_an_unused_layer_is_refused_also_from_the_cache(
    run: Examples, tmp_path: Path
) -> None:
    model = model_with_a_spare_layer()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj", "spare_proj"))
    inject(model, config, seed=0)
    cache = VerificationCache(tmp_path / "train" / "one")
    for _ in range(2):
        with pytest.raises(TargetError, match=r"1 adapted layers .* model\.layers\.1\.spare_proj;"):
            verify_reader(run, model, inputs(), CPU, cache)
    assert len(list(cache.folder.iterdir())) == 1


def test_unused_weights_of_a_control_and_used_layers_are_accepted(
    run: Examples, tmp_path: Path
) -> None:
    cache = VerificationCache(tmp_path / "train" / "one")
    model = model_with_a_spare_layer()
    _, found = verify_reader(run, model, inputs(full=True), CPU, cache)
    assert found.without_gradient == (
        "model.layers.1.spare_proj.weight",
        "model.layers.1.spare_proj.bias",
    )
    inject(model, LoraConfig(r=2, lora_alpha=4, exclude_modules=("spare_proj",)), seed=0)
    _, found = verify_reader(run, model, inputs(), CPU, cache)
    assert found.without_gradient == ()
