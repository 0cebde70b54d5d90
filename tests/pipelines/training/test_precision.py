"""In bfloat16 on a CPU, products alone are in it; what is trained is float32 in every case."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from training_stages import (
    MODEL_FILE,
    TrainingStages,
    adapter_of,
    launch_training,
    losses_of,
)

from lora_core import LoraLinear
from pipelines.models.forward import PackReader
from pipelines.models.packs import Pack
from pipelines.training import objective
from pipelines.training.train import train
from pipelines.workflow.stages import TrainStage

pytestmark = pytest.mark.slow
FLOAT32, BFLOAT16 = "float32", "bfloat16"
DTYPES = (FLOAT32, BFLOAT16)


@pytest.fixture
def fresh_accelerate() -> Iterator[Callable[[], None]]:
    """Return a function that resets accelerate's precision, which it keeps per process."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    yield reset
    reset()


def _control(prepared: TrainingStages, dtype: str) -> TrainStage:
    changes = {"control": {"learning_rate": 1e-5}, "training": {"dtype": dtype}}
    return prepared(None, dtype, **changes)


def test_a_control_in_bfloat16_trains_float32_weights(
    prepared: TrainingStages,
    fresh_accelerate: Callable[[], None],
) -> None:
    """A learning rate of 1e-5 is below the spacing of nearly all weights in bfloat16."""
    stages = {dtype: _control(prepared, dtype) for dtype in DTYPES}
    changed = {}
    for dtype, stage in stages.items():
        fresh_accelerate()
        train(stage.begin())
        trained = load_file(str(stage.folder / MODEL_FILE))
        base = load_file(str(stage.paths.required("base") / "model.safetensors"))
        assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
        changed[dtype] = {
            name: float((tensor != base[name]).float().mean()) for name, tensor in trained.items()
        }
    in_bfloat16 = changed[BFLOAT16]
    for name, fraction in changed[FLOAT32].items():
        assert in_bfloat16[name] == pytest.approx(fraction, abs=0.02), name
        assert "embed" in name or in_bfloat16[name] > 0.97
    result = stages[BFLOAT16].result()
    assert result is not None
    assert result.facts.forward.path == "packed"
    assert result.facts.forward.loss_tolerance == 1e-4  # the readers are compared in float32
    assert result.facts.forward.rounding is not None
    assert result.facts.forward.rounding.loss > 0
    assert result.facts.dtype == BFLOAT16


def test_an_adapter_in_bfloat16_keeps_states_and_head_in_float32(
    prepared: TrainingStages,
    monkeypatch: pytest.MonkeyPatch,
    fresh_accelerate: Callable[[], None],
) -> None:
    """Norms, residuals and the loss would lose more by 16 bits than they would gain in speed."""
    read = PackReader._rows
    head = objective.LossHead.forward
    seen: dict[str, set[Any]] = {"autocast": set(), "products": set(), "head": set()}

    def rows(self: PackReader, pack: Pack) -> torch.Tensor:
        seen["autocast"].add(torch.is_autocast_enabled("cpu"))
        layer = next(one for one in self.model.modules() if isinstance(one, LoraLinear))
        hook = layer.register_forward_hook(lambda _, __, output: seen["products"].add(output.dtype))
        try:
            return read(self, pack)
        finally:
            hook.remove()

    def loss(self: objective.LossHead, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen["head"].add((states.dtype, self.weight.dtype, torch.is_autocast_enabled("cpu")))
        return head(self, states, targets)

    monkeypatch.setattr(PackReader, "_rows", rows)
    monkeypatch.setattr(objective.LossHead, "forward", loss)
    losses = {}
    for dtype in DTYPES:
        fresh_accelerate()
        for values in seen.values():
            values.clear()
        stage = prepared(4, f"adapter-{dtype}", training={"dtype": dtype})
        train(stage.begin())
        losses[dtype] = losses_of(stage)
        assert {tensor.dtype for tensor in adapter_of(stage).values()} == {torch.float32}
        assert seen == {  # the verification before the training is in float32
            "autocast": {False, dtype == BFLOAT16},
            "products": {torch.float32, getattr(torch, dtype)},
            "head": {(torch.float32, torch.float32, False)},
        }
    assert losses[BFLOAT16] == pytest.approx(losses[FLOAT32], abs=0.01)
    assert losses[BFLOAT16] != losses[FLOAT32]


@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero2"])
@pytest.mark.parametrize("rank", [4, None], ids=["LoRA", "full"])
def test_two_ranks_train_in_bfloat16(
    prepared: TrainingStages, config: str, rank: int | None
) -> None:
    launch: dict[str, Any] = {"config": config, "processes": 2}
    losses = {}
    for dtype in DTYPES:
        name = f"{config}-{rank}-{dtype}"
        stage = prepared(rank, name, training={"dtype": dtype}, launch=launch)
        result = launch_training(stage, **launch)
        assert result.facts.dtype == dtype
        losses[dtype] = losses_of(stage)
    assert losses[BFLOAT16] == pytest.approx(losses[FLOAT32], abs=0.01)
    assert losses[BFLOAT16] != losses[FLOAT32]
