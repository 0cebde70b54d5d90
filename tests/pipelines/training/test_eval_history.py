"""The best evaluation, the early stop, the kept weights and the shown metric, without a model."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.tracking.step_metrics import StepMetrics
from pipelines.training.best_weights import BestWeights
from pipelines.training.eval_history import EvalHistory
from pipelines.training.evaluations import Evaluations
from pipelines.training.held_out import HeldOutExamples

NO_EXAMPLES = HeldOutExamples(None, [], supervised_tokens=0, largest_pack_tokens=0)


def history_of(*losses: float) -> EvalHistory:
    """Return evaluations after steps 10, 20 and so on."""
    return EvalHistory([(10 * number, loss) for number, loss in enumerate(losses, start=1)])


@pytest.mark.parametrize(
    ("losses", "best_step", "stops"),
    [
        ((3.0,), 10, False),
        ((3.0, 2.0, 2.5), 20, False),
        ((3.0, 2.0, 2.5, 2.1), 20, True),
        ((3.0, 2.0, 2.0, 2.0), 20, True),  # an equal loss is not an improvement
        ((3.0, 4.0, 2.9, 3.5), 30, False),
    ],
)
def test_patience_counts_evaluations_since_the_best(
    losses: tuple[float, ...], best_step: int, stops: bool
) -> None:
    history = history_of(*losses)
    assert history.best == (best_step, min(losses))
    assert history.is_exhausted(2) is stops
    assert not history.is_exhausted(None)


def test_an_empty_history_has_no_best_step_and_does_not_stop() -> None:
    assert history_of().best is None
    assert not history_of().is_exhausted(1)


def test_a_history_is_read_from_the_rows_of_its_steps() -> None:
    rows: list[dict[str, Any]] = [{"step": step, "loss": 5.0 - step} for step in range(1, 6)]
    rows[1]["eval_loss"] = 4.5
    rows[4]["eval_loss"] = 4.75
    assert EvalHistory.of_rows(rows) == EvalHistory([(2, 4.5), (5, 4.75)])
    assert EvalHistory.of_rows(rows[:4]) == EvalHistory.of_rows(rows).until(4)


def test_weights_stay_while_a_checkpoint_needs_them(tmp_path: Path) -> None:
    """The best of all, and the best at each checkpoint."""
    weights = BestWeights(tmp_path)
    for step in (10, 20, 40, 50):
        weights.of_step(step).mkdir()
    evaluations = Evaluations(10, None, NO_EXAMPLES, weights, history_of(5.0, 4.0, 4.5, 3.0, 2.0))
    evaluations.remove_unneeded([5, 30])
    assert {path.name for path in tmp_path.iterdir()} == {"step-00020", "step-00050"}


def test_a_run_that_lacks_its_best_weights_or_losses_does_not_resume(tmp_path: Path) -> None:
    weights = BestWeights(tmp_path / "checkpoints" / "best")

    def problem_of(history: EvalHistory, first: int) -> str:
        return Evaluations(10, None, NO_EXAMPLES, weights, history).problem(first) or ""

    assert problem_of(history_of(), 0) == problem_of(history_of(), 9) == ""
    lost = problem_of(history_of(3.0), 25)
    assert "losses of steps [10], not of [10, 20]; restore it, or delete" in lost
    removed = problem_of(history_of(3.0), 12)
    assert "step-00010, the best weights so far, does not exist; restore it, or delete" in removed
    weights.of_step(10).mkdir(parents=True)
    assert problem_of(history_of(3.0), 12) == ""


def test_evaluations_are_due_at_multiples_and_at_the_end() -> None:
    evaluations = Evaluations(4, None, NO_EXAMPLES, BestWeights(Path()))
    assert [step for step in range(1, 11) if evaluations.is_due(step, 10)] == [4, 8, 10]


def test_the_held_out_loss_has_the_steps_of_the_training_loss() -> None:
    row = {"step": 4, "time": 1.5, "seconds": 1, "loss": 2.0, "eval_loss": 2.5}
    points = list(StepMetrics.model_validate(row).points())
    assert ("train/loss", 2.0, 1500, 4) in points
    assert ("train/eval_loss", 2.5, 1500, 4) in points
    del row["eval_loss"]
    names = [name for name, *_ in StepMetrics.model_validate(row).points()]
    assert "train/eval_loss" not in names
