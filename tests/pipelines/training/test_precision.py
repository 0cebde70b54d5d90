"""In bfloat16, the control trains float32 weights, and an adapter computes without autocast."""

from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from training_stages import MODEL_FILE, TrainingStages, adapter_of, losses_of

from pipelines.models.hardware import Hardware
from pipelines.models.packs import Pack
from pipelines.training import objective
from pipelines.training import train as train_module
from pipelines.training.train import train

pytestmark = pytest.mark.slow
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def fresh_accelerate() -> Iterator[Callable[[], None]]:
    """Return a function that resets accelerate's precision, which it keeps per process."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    yield reset
    reset()


def use_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Compute in a dtype on this CPU, as a GPU does."""
    monkeypatch.setattr(train_module, "detect", lambda: Hardware("cpu", dtype, "gloo"))


def test_a_control_in_bfloat16_trains_float32_weights(
    prepared: TrainingStages,
    monkeypatch: pytest.MonkeyPatch,
    fresh_accelerate: Callable[[], None],
) -> None:
    """A learning rate of 1e-5 is below the spacing of nearly all weights in bfloat16."""
    control = {"learning_rate": 1e-5}
    stages = {dtype: prepared(None, str(dtype), control=control) for dtype in DTYPES}
    changed = {}
    for dtype, stage in stages.items():
        fresh_accelerate()
        use_dtype(monkeypatch, dtype)
        train(stage.begin())
        trained = load_file(str(stage.folder / MODEL_FILE))
        base = load_file(str(stage.paths.required("base") / "model.safetensors"))
        assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
        changed[dtype] = {
            name: float((tensor != base[name]).float().mean()) for name, tensor in trained.items()
        }
    in_bfloat16 = changed[torch.bfloat16]
    for name, fraction in changed[torch.float32].items():
        assert in_bfloat16[name] == pytest.approx(fraction, abs=0.02), name
        assert "embed" in name or in_bfloat16[name] > 0.97
    result = stages[torch.bfloat16].result()
    assert result is not None
    assert result.facts.forward.path == "packed"
    assert result.facts.forward.loss_tolerance == 0.02


def test_an_adapter_in_bfloat16_computes_without_autocast(
    prepared: TrainingStages,
    monkeypatch: pytest.MonkeyPatch,
    fresh_accelerate: Callable[[], None],
) -> None:
    """As in evaluation: a router or a norm that a model keeps in float32 stays in float32."""
    forward = objective.Objective.forward
    autocast: list[bool] = []

    def recorded(self: objective.Objective, part: Pack) -> torch.Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return forward(self, part)

    monkeypatch.setattr(objective.Objective, "forward", recorded)
    losses = {}
    for dtype in DTYPES:
        fresh_accelerate()
        stage = prepared(4, f"adapter-{dtype}")
        use_dtype(monkeypatch, dtype)
        train(stage.begin())
        losses[dtype] = losses_of(stage)
        assert {tensor.dtype for tensor in adapter_of(stage).values()} == {torch.float32}
    assert autocast and not any(autocast)
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], abs=0.05)
    assert losses[torch.bfloat16] != losses[torch.float32]
