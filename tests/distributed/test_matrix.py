"""Every launch trains every method on two ranks as one process does, and resumes bit for bit.

Two ranks sum in another order than one, so float32 differs in its last digits. A run that was
interrupted and resumed does not differ at all.
"""

from typing import Any

import pytest
from safetensors import safe_open

from distributed.trainings import (
    LAUNCHES,
    METHODS,
    RANK,
    Trainings,
    farthest,
    losses,
    outcome,
    train_all,
)
from pipelines.runtime.stage import Stage, read_records

pytestmark = pytest.mark.slow
LOSS = 2e-6
"""Largest difference of any step's loss: a few units in the last place of float32 at about 5.7."""
WEIGHTS = 5e-5
"""Largest difference of any trained tensor, as a fraction of its norm.

Adam divides by the size of the gradient, which amplifies noise.
"""
NORM = 1e-4
"""Largest relative difference of the gradient norm at any step."""
BREAK = 3
MICRO_BATCHES: dict[str, Any] = {"training": {"gradient_accumulation_steps": 2}}
"""Two processes take in two micro-batches each what one process takes at once."""
Runs = dict[str, tuple[Stage, Stage]]


@pytest.fixture(scope="module", params=LAUNCHES)
def runs(request: pytest.FixtureRequest, trainings: Trainings) -> Runs:
    """Return every method under one launch, uninterrupted, and interrupted after three steps."""
    name = request.param
    uninterrupted = {
        method: trainings.stage(method, name, 2, **MICRO_BATCHES) for method in METHODS
    }
    interrupted = {
        method: trainings.stage(method, f"{name}-interrupted", 2, **MICRO_BATCHES)
        for method in METHODS
    }
    words = [str(stage.folder) for stage in uninterrupted.values()]
    words += [
        word
        for stage in interrupted.values()
        for word in (f"{stage.folder}:{BREAK}", str(stage.folder))
    ]
    train_all(name, 2, words, trainings.root / f"{name}.log")
    return {method: (uninterrupted[method], interrupted[method]) for method in METHODS}


def gradient_norms(stage: Stage) -> list[float]:
    return [row["grad_norm"] for row in read_records(stage.folder / "metrics.jsonl")]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one_process(alone: dict[str, Stage], runs: Runs, method: str) -> None:
    uninterrupted, _ = runs[method]
    assert losses(uninterrupted) == pytest.approx(losses(alone[method]), abs=LOSS)
    assert gradient_norms(uninterrupted) == pytest.approx(gradient_norms(alone[method]), rel=NORM)
    assert losses(uninterrupted)[-1] < losses(uninterrupted)[0] - 0.1
    assert farthest(outcome(alone[method]), outcome(uninterrupted)) < WEIGHTS


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_exact(runs: Runs, method: str) -> None:
    uninterrupted, interrupted = runs[method]
    assert losses(interrupted) == losses(uninterrupted)
    assert farthest(outcome(uninterrupted), outcome(interrupted)) == 0.0


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_the_adapter_is_complete(runs: Runs, method: str) -> None:
    """Under ZeRO-3 a weight that is not gathered is saved empty or flat."""
    file = runs[method][0].folder / "adapter" / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - not a dict
    assert len(shapes) == 2 * 2 * 7
    assert all(len(shape) == 2 and RANK in shape for shape in shapes.values())
