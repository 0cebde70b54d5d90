"""Evaluate a training every few steps, keep its best weights, and stop it early."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import broadcast_object_list

from lora_core import LoraConfig
from pipelines.errors import PipelineError
from pipelines.runtime.interfaces.inputs import TrainInputs
from pipelines.training.best_weights import BEST, BestWeights
from pipelines.training.engine import Engine
from pipelines.training.eval_history import EvalHistory
from pipelines.training.held_out import HeldOutExamples, held_out_loss
from pipelines.training.log import METRICS, Log
from pipelines.training.run import Run


@dataclass
class Evaluations:
    """The evaluations of one training, the same on every rank."""

    every: int
    """Steps between two evaluations."""
    patience: int | None
    """Evaluations without improvement after which the training stops; None for no limit."""
    examples: HeldOutExamples
    weights: BestWeights
    history: EvalHistory = field(default_factory=EvalHistory)
    """Replaced after each evaluation."""

    def is_due(self, step: int, steps: int) -> bool:
        """Return whether the weights after `step` of `steps` steps are evaluated."""
        return step % self.every == 0 or step == steps

    @property
    def should_stop(self) -> bool:
        """Whether the loss has not improved for too long."""
        return self.history.is_exhausted(self.patience)

    @property
    def best_step(self) -> int:
        """The step with the lowest loss so far."""
        best = self.history.best
        assert best is not None, "the best step is read after an evaluation"
        return best[0]

    def evaluate(
        self,
        run: Run,
        engine: Engine,
        config: LoraConfig | None,
        inputs: TrainInputs,
        step: int,
    ) -> float:
        """Return the held-out loss after `step` steps; save the weights if it is the lowest.

        A collective: every rank calls it.

        Args:
            run: the data of this rank.
            engine: what is evaluated.
            config: the adapter's; None for full fine-tuning.
            inputs: for the identity that is saved with an adapter.
            step: number of steps taken.

        Raises:
            DivergenceError: the loss is not finite; raised on every rank.
        """
        loss = held_out_loss(run, engine, self.examples, step)
        self.history = self.history.extended(step, loss)
        if self.best_step == step:
            with run.timer.phase("snapshot"):
                self.weights.save(engine, config, inputs, step)
        return loss

    def describe(self, taken: int, steps: int) -> str:
        """Return which weights are saved, and why the training stopped if it did so early.

        Args:
            taken: steps that were taken.
            steps: steps of the recipe.
        """
        best = self.history.best
        assert best is not None, "the last step of a training is evaluated"
        step, loss = best
        text = f"the weights after step {step} are saved: their held-out loss {loss:.4f} is lowest"
        if taken == steps:
            return text
        reason = f"{self.patience} evaluations did not improve the held-out loss"
        return f"stopped early after step {taken} of {steps}: {reason}; {text}"

    def problem(self, first: int) -> str | None:
        """Return why a run cannot resume after `first` steps: what it needs of them is missing."""
        expected = list(range(self.every, first + 1, self.every))
        evaluated = [step for step, _ in self.history.losses]
        best = self.history.best
        if evaluated != expected:
            missing = f"{METRICS} has the held-out losses of steps {evaluated}, not of {expected}"
        elif best is not None and not self.weights.of_step(best[0]).is_dir():
            missing = f"{self.weights.of_step(best[0])}, the best weights so far, does not exist"
        else:
            return None
        return (
            f"the training cannot resume after step {first}: {missing}; restore it, or delete "
            f"{self.weights.folder.parent} to train from the start"
        )

    def remove_unneeded(self, checkpoints: Iterable[int]) -> None:
        """Remove weights that are not the best ones, now or for a run that resumes. On rank 0.

        Args:
            checkpoints: steps of the checkpoints from which a run may resume.
        """
        needed = {self.best_step}
        for step in checkpoints:
            best = self.history.until(step).best
            if best is not None:
                needed.add(best[0])
        self.weights.remove_all_but(needed)


def resume_evaluations(
    inputs: TrainInputs,
    examples: HeldOutExamples | None,
    *,
    checkpoints: Path,
    log: Log,
    first: int,
) -> Evaluations | None:
    """Return the evaluations of a training that starts or resumes; None if it has none.

    A collective: rank 0 has the log, and every rank gets the losses that are in it.

    Args:
        inputs: with the settings.
        examples: the tuning examples; None without `evaluate_every`.
        checkpoints: folder of the checkpoints.
        log: on rank 0, has the rows of the steps before this process.
        first: number of these steps.

    Raises:
        PipelineError: earlier losses or the best weights are missing; raised on every rank.
    """
    every = inputs.training.evaluate_every
    if every is None or examples is None:
        return None
    weights = BestWeights(checkpoints / BEST)
    patience = inputs.training.early_stopping_patience
    (history,) = broadcast_object_list([EvalHistory.of_rows(log.rows)])
    evaluations = Evaluations(every, patience, examples, weights, history)
    (problem,) = broadcast_object_list([evaluations.problem(first)])
    if problem is not None:
        raise PipelineError(problem)
    return evaluations
