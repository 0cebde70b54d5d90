"""The evaluations of a finished training, as its result records them."""

from collections.abc import Sequence

from pipelines.runtime.interfaces.results import HeldOutLoss, HeldOutLosses
from pipelines.training.eval_history import EvalHistory
from pipelines.training.log import Row


def held_out_losses(rows: Sequence[Row], steps: int, examples: int) -> HeldOutLosses:
    """Return the evaluations of a finished training for its result.

    Args:
        rows: of all steps that were taken.
        steps: number of steps of the recipe.
        examples: number of tuning examples.
    """
    history = EvalHistory.of_rows(rows)
    assert history.best is not None, "the last step of a training is evaluated"
    losses = []
    previous = 0
    for step, loss in history.losses:
        since = [float(row["loss"]) for row in rows[previous:step]]
        train_loss = sum(since) / len(since)
        losses.append(HeldOutLoss(step=step, eval_loss=loss, train_loss=train_loss))
        previous = step
    best_step, best_loss = history.best
    return HeldOutLosses(
        losses=tuple(losses),
        best_step=best_step,
        best_eval_loss=best_loss,
        stopped_early=len(rows) < steps,
        examples=examples,
    )
