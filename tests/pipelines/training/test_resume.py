"""A run that was stopped resumes bit for bit, with real processes, and leaves no process behind."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from training_stages import (
    ADAPTER_FILE,
    MODEL_FILE,
    TrainingStages,
    adapter_of,
    checkpoint_weights,
    latest_checkpoint,
    launch_training,
    losses_of,
    processes_left,
    train_and_kill,
    train_interrupted,
)

from lora_core.calibration import data_driven
from lora_core.init.spectral import spectral_init
from lora_core.layers import linear
from pipelines.models.hardware import PAGED, Optimizer
from pipelines.training import build
from pipelines.training.train import train
from pipelines.workflow.stages import TrainStage

pytestmark = pytest.mark.slow
ZERO2 = {"config": "cpu_zero2", "processes": 2}
MANY_SETTINGS = {
    "dropout": 0.1,
    "use_dora": True,
    "loraplus_ratio": 4,
    "init": "pissa_niter_2",
    "exclude_modules": ["down_proj"],
    "layers_to_transform": [1],
}
TINY_WEIGHTS_PER_RANK = 2 * (4 * 64 + 2 * 32 + 2 * 64 + 64 + 128 + 128 + 64 + 128 + 64)
"""Weights of A and B in both blocks of the tiny model, for each unit of rank."""


def assert_same_file(name: str, one: TrainStage, other: TrainStage) -> None:
    assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_resume_after_a_kill_is_bit_exact(prepared: TrainingStages) -> None:
    uninterrupted = prepared(4, "uninterrupted", launch=ZERO2, lora=MANY_SETTINGS)
    killed = prepared(4, "killed", launch=ZERO2, lora=MANY_SETTINGS)
    launch_training(uninterrupted, **ZERO2)
    assert train_and_kill(killed, after_steps=3) >= 3
    assert processes_left(killed, seconds=20) == []
    initial = [name for name in checkpoint_weights(killed) if name.endswith((".init_A", ".init_B"))]
    assert len(initial) == 2 * 6  # A and B of each of block 1's targets
    launch_training(killed, **ZERO2)
    log = (killed.folder / "log.txt").read_text()
    assert "from step 2" in log or "from step 4" in log  # depends on when the kill arrived
    assert losses_of(killed) == losses_of(uninterrupted)
    assert_same_file(ADAPTER_FILE, killed, uninterrupted)
    saved = adapter_of(killed)
    ranks = {tensor.shape[0] for key, tensor in saved.items() if "lora_A" in key}
    assert ranks == {8}  # the trained pair minus the initial one
    assert any(key.endswith("q_proj.lora_magnitude_vector") for key in saved)
    assert not any("layers.0." in key or "down_proj" in key for key in saved)


def test_a_resumed_run_keeps_the_initialization_of_its_checkpoint(
    prepared: TrainingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's decomposition may differ; the first initialization is subtracted."""
    uninterrupted = prepared(4, "uninterrupted", lora={"init": "pissa"})
    stopped = prepared(4, "stopped", lora={"init": "pissa"})
    train(uninterrupted.begin())
    train_interrupted(stopped, monkeypatch, steps=3)
    kinds = {name.rpartition(".")[2] for name in checkpoint_weights(stopped)}
    assert kinds == {"lora_A", "lora_B", "init_A", "init_B"}  # and nothing of the base

    def other_init(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(0.5 * factor for factor in spectral_init(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(linear, "spectral_init", other_init)
        train(stopped.begin())
    assert losses_of(stopped) == losses_of(uninterrupted)
    assert_same_file(ADAPTER_FILE, stopped, uninterrupted)
    result = stopped.result()
    assert result is not None
    assert result.saved.file_rank == 8
    assert result.facts.trained_weights == 4 * TINY_WEIGHTS_PER_RANK


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_resume_of_a_control_with_8_bit_state_is_bit_exact(
    prepared: TrainingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the state is paged."""
    uninterrupted = prepared(None, "uninterrupted")
    stopped = prepared(None, "stopped")
    paged = Optimizer(PAGED, "chosen by the test")
    monkeypatch.setattr(build, "select_optimizer", lambda *_, **__: paged)
    train(uninterrupted.begin())
    train_interrupted(stopped, monkeypatch, steps=3)
    means = load_file(str(latest_checkpoint(stopped) / "exp_avg.safetensors"))
    assert means["model.layers.0.mlp.down_proj.weight"].dtype is torch.uint8
    train(stopped.begin())
    assert losses_of(stopped) == losses_of(uninterrupted)
    assert_same_file(MODEL_FILE, stopped, uninterrupted)
    result = uninterrupted.result()
    assert result is not None
    assert result.facts.optimizer == "paged 8-bit AdamW"


def test_a_resumed_run_does_not_repeat_a_data_driven_initialization(
    prepared: TrainingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = prepared(4, "uninterrupted", lora={"init": "eva"})
    stopped = prepared(4, "stopped", lora={"init": "eva"})
    train(uninterrupted.begin())
    train_interrupted(stopped, monkeypatch, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(data_driven, "eva_initialization", None)
        train(stopped.begin())
    assert losses_of(stopped) == losses_of(uninterrupted)


def test_a_finished_run_that_lacks_a_snapshot_keeps_its_result(prepared: TrainingStages) -> None:
    """It trains up to the snapshot and no further, and its files stay the same byte for byte."""
    stage = prepared(4, "snapshot-later")
    train(stage.begin())
    result = stage.result()
    names = ("metrics.jsonl", ADAPTER_FILE)
    before = {name: (stage.folder / name).read_bytes() for name in names}
    expected = "snapshots/step-00002/adapter/adapter_config.json"
    assert stage.options is not None
    options = stage.options.model_copy(update={"snapshots": (2,)})
    with_snapshot = replace(stage, options=options, expects=(expected,))
    assert with_snapshot.folder == stage.folder
    assert with_snapshot.result() is None
    train(with_snapshot.begin())
    assert with_snapshot.result() == result
    assert (stage.folder / expected).is_file()
    assert {name: (stage.folder / name).read_bytes() for name in names} == before
    assert not (stage.folder / "checkpoints").exists()
