"""A step reduces its loss once, and changes nothing if the loss of a micro-batch is not finite."""

from typing import Any

import pytest
import torch
from torch import Tensor
from training_stages import TrainingStages, losses_of

from pipelines.errors import DivergenceError
from pipelines.training import step
from pipelines.training.objective import Objective
from pipelines.training.train import train

TWO_MICRO_BATCHES = {"gradient_accumulation_steps": 2, "steps": 3}


def test_a_step_of_two_micro_batches_reduces_its_loss_once(
    prepared: TrainingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    reductions = []
    sum_over_ranks = step.sum_over_ranks

    def counted(*arguments: Any) -> float:
        reductions.append(arguments[-1])
        return sum_over_ranks(*arguments)

    monkeypatch.setattr(step, "sum_over_ranks", counted)
    stage = prepared(4, training=TWO_MICRO_BATCHES)
    train(stage.begin())
    assert reductions == [0, 1, 2]
    one_micro_batch = prepared(4, "one-micro-batch", training={"steps": 3})
    assert one_micro_batch.key == stage.key
    train(one_micro_batch.begin())
    assert losses_of(stage) == pytest.approx(losses_of(one_micro_batch), abs=2e-4)


def test_a_step_whose_first_micro_batch_diverges_changes_no_weight(
    prepared: TrainingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the second one is finite; the sum of both is checked before the update."""
    forward = Objective.forward
    passes = []

    def diverging(self: Objective, part: Any) -> Tensor:
        loss = forward(self, part)
        if self.training and loss.requires_grad:
            passes.append(loss)
        return loss * float("nan") if len(passes) == 3 else loss

    updates = []
    step_of_adamw = torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        updates.append(self)
        return step_of_adamw(self, *arguments, **options)

    monkeypatch.setattr(Objective, "forward", diverging)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    stage = prepared(2, training=TWO_MICRO_BATCHES)
    with pytest.raises(DivergenceError, match=r"the loss of step 2 is nan on rank 0"):
        train(stage.begin())
    assert len(updates) == 1
    assert len(losses_of(stage)) == 1
