"""The result of a training records its evaluations next to the training loss."""

from pipelines.training.held_out_losses import held_out_losses
from pipelines.training.log import Row


def test_the_training_loss_is_the_mean_since_the_previous_evaluation() -> None:
    rows: list[Row] = [{"step": step, "loss": 5.0 - step} for step in range(1, 6)]
    rows[1]["eval_loss"] = 4.5
    rows[4]["eval_loss"] = 4.75
    result = held_out_losses(rows, 9, 3)
    assert [one.step for one in result.losses] == [2, 5]
    assert [one.train_loss for one in result.losses] == [3.5, 1.0]
    assert (result.best_step, result.best_eval_loss, result.examples) == (2, 4.5, 3)
    assert result.stopped_early
    assert not held_out_losses(rows, 5, 3).stopped_early
