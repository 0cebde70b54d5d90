"""Train the experiments of a run, and choose the learning rate of the control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from pipelines.config.experiments import CONTROL, Experiment, control_experiments
from pipelines.console import print_status
from pipelines.errors import DivergenceError, MemoryExceededError, RecipeError, StageError
from pipelines.planning.fitting import what_would_fit
from pipelines.runtime.interfaces.results import BaseResult, TrainResult, TuneResult
from pipelines.workflow import tasks
from pipelines.workflow.run import PipelineRun, TrainedExperiment
from pipelines.workflow.stages import PreparedData, TrainStage

MIN_TUNING_EXAMPLES = 4


@dataclass(frozen=True)
class TrainedControl:
    """The control at each of its learning rates."""

    chosen: Sequence[TrainedExperiment] = ()
    """The one with the lowest tuning loss; empty if the recipe has no control."""
    others: Sequence[TrainedExperiment] = ()
    tuning_losses: Mapping[float, float] = field(default_factory=dict)
    """Learning rate → loss on the tuning examples, infinite if training diverged; empty for a
    single rate."""


def train_one(
    run: PipelineRun, base: BaseResult, data: PreparedData, experiment: Experiment
) -> TrainedExperiment:
    """Train an experiment to its end."""
    stage = run.stages.train(base, data, experiment)
    mlflow_experiment = run.recipe.registry.experiment or run.recipe.name
    result = run_training(run, experiment, stage, mlflow_experiment)
    return TrainedExperiment(experiment, stage, result)


def run_training(
    run: PipelineRun, experiment: Experiment, stage: TrainStage, mlflow_experiment: str | None
) -> TrainResult:
    """Train on all processes; if memory runs out, the error names what needs less.

    Args:
        run: with the recipe and the plan.
        experiment: what is trained.
        stage: of that training, or of its beginning.
        mlflow_experiment: shows the training while it runs; None for no run in MLflow.
    """
    try:
        result: TrainResult = run.run_stage(
            tasks.train, stage, run.recipe.launch, mlflow_experiment
        )
    except StageError as error:
        if error.kind != MemoryExceededError.__name__ or run.plan is None:
            raise
        advice = what_would_fit(run.plan, experiment.label)
        raise StageError(f"{error}; {advice}", error.kind) from error
    return result


def train_control(run: PipelineRun, base: BaseResult, data: PreparedData) -> TrainedControl:
    """Train the control at each learning rate, and choose the rate with the lowest tuning loss.

    A learning rate at which training diverges is left out, unless it is the only one.

    Raises:
        RecipeError: there are too few tuning examples to choose on, or training diverges at every
            rate.
    """
    experiments = control_experiments(run.recipe)
    if len(experiments) < 2:
        return TrainedControl([train_one(run, base, data, one) for one in experiments])
    rates = f"control.learning_rate names {len(experiments)} rates"
    check_tuning_examples(rates, data.result.tuning_examples)
    candidates = []
    losses = {experiment.learning_rate: inf for experiment in experiments}
    for experiment in experiments:
        trained = train_or_diverge(run, base, data, experiment)
        if trained is not None:
            candidates.append(trained)
    tuned = tune_all(run, base, data, [trained.stage for trained in candidates])
    for trained, result in zip(candidates, tuned, strict=True):
        losses[trained.experiment.learning_rate] = result.tuning_loss
    if not candidates:
        rates = ", ".join(f"{rate:g}" for rate in losses)
        raise RecipeError(f"the control diverged at each of its rates ({rates}); name lower ones")
    best = min(candidates, key=lambda trained: losses[trained.experiment.learning_rate])
    chosen = replace(best, experiment=replace(best.experiment, label=CONTROL))
    others = [trained for trained in candidates if trained is not best]
    return TrainedControl([chosen], others, losses)


def tune_all(
    run: PipelineRun, base: BaseResult, data: PreparedData, trained: Sequence[TrainStage]
) -> list[TuneResult]:
    """Return the losses of trained models on the tuning examples."""
    stages = [run.stages.tune(base, data, stage) for stage in trained]
    run.run_stages(tasks.tune, stages)
    results = []
    for stage in stages:
        result = stage.result()
        assert result is not None, "run_stages raises an error for a stage without a result"
        results.append(result)
    return results


def check_tuning_examples(choice: str, examples: int) -> None:
    """Check that there are enough tuning examples to choose on.

    Args:
        choice: the setting and how much it names, for the message.
        examples: the tuning examples.

    Raises:
        RecipeError: there are too few.
    """
    if examples < MIN_TUNING_EXAMPLES:
        raise RecipeError(
            f"{choice}, and the held-out groups leave {examples} examples to choose on, of at "
            f"least {MIN_TUNING_EXAMPLES}; lower data.validation_examples, or add rows"
        )


def train_or_diverge(
    run: PipelineRun, base: BaseResult, data: PreparedData, experiment: Experiment
) -> TrainedExperiment | None:
    """Train one of several experiments; return None if its loss is no longer finite."""
    try:
        return train_one(run, base, data, experiment)
    except StageError as error:
        if error.kind != DivergenceError.__name__:
            raise
        print_status(experiment.label, mark="✗", aside=f"diverged: {error}")
        return None
