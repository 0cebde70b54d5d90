"""A step reduces its loss once and reads it with the gradient norm.

It changes nothing if the loss of a micro-batch is not finite.
"""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_stages import TrainingStages, losses_of

from pipelines.errors import DivergenceError
from pipelines.training import train as train_module
from pipelines.training.engine import Engine
from pipelines.training.objective import Objective
from pipelines.training.run import Run
from pipelines.training.train import train

TWO_MICRO_BATCHES = {"gradient_accumulation_steps": 2, "steps": 3}


def test_a_step_of_two_micro_batches_reduces_its_loss_once(
    prepared: TrainingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    reductions = []
    reduce = Accelerator.reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        reductions.append(arguments)
        return reduce(*arguments, **options)

    monkeypatch.setattr(Accelerator, "reduce", counted)
    stage = prepared(4, training=TWO_MICRO_BATCHES)
    train(stage.begin())
    assert len(reductions) == len(losses_of(stage)) == 3
    one_micro_batch = prepared(4, "one-micro-batch", training={"steps": 3})
    assert one_micro_batch.key == stage.key
    train(one_micro_batch.begin())
    assert losses_of(stage) == pytest.approx(losses_of(one_micro_batch), abs=2e-4)


class ScalarReads(TorchDispatchMode):
    """Counts the reads of single values from tensors, each of which waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, _: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def test_a_step_reads_loss_and_norm_in_one_transfer(
    prepared: TrainingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's own reads do not count: on a CPU it reads its number of steps, on a GPU nothing."""
    transfers = []
    reads = ScalarReads()
    train_step = train_module.train_step
    update = Engine.update
    tolist = Tensor.tolist

    def counted_transfer(self: Tensor) -> Any:
        transfers.append(self.shape)
        return tolist(self)

    def uncounted_update(self: Engine) -> None:
        before = reads.count
        update(self)
        reads.count = before

    def counted_step(run: Run, engine: Engine, step: int) -> Any:
        with reads, monkeypatch.context() as patch:
            patch.setattr(Tensor, "tolist", counted_transfer)
            return train_step(run, engine, step)

    monkeypatch.setattr(Engine, "update", uncounted_update)
    monkeypatch.setattr(train_module, "train_step", counted_step)
    train(prepared(4, "reads", training=TWO_MICRO_BATCHES).begin())
    assert transfers == [torch.Size([2])] * 3
    assert reads.count == 0


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
