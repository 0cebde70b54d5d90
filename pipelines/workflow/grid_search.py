"""Search the grid of a recipe by successive halving.

Every trial is a stage: the beginning of the training of one experiment, which continues from its
checkpoint if the experiment survives. A search that was stopped continues, and a survivor is the
same adapter, to the bit, as if it had been trained alone.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING

from lora_core.files import atomic_folder
from pipelines.config.experiments import (
    Experiment,
    grid_experiments,
    rank_experiments,
    target_variants,
)
from pipelines.config.halving import Rung, rungs
from pipelines.console import print_status
from pipelines.errors import DivergenceError, RecipeError, StageError
from pipelines.runtime.interfaces.plan_result import PlanResult
from pipelines.runtime.interfaces.results import BaseResult
from pipelines.runtime.stage import RESULT
from pipelines.workflow import tasks
from pipelines.workflow.publishing import check_adapter_sizes
from pipelines.workflow.run import PipelineRun, TrainedExperiment
from pipelines.workflow.stages import PreparedData, TrainStage
from pipelines.workflow.training import (
    check_tuning_examples,
    run_training,
    train_one,
    train_or_diverge,
    tune_all,
)

if TYPE_CHECKING:
    from pipelines.comparison.grid import GridRung, GridSearch
    from pipelines.runtime.interfaces.results import TuneResult

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
"""What a training continues from, in the folder of its stage."""


@dataclass(frozen=True)
class TrainedAdapters:
    """The adapters that a run compares."""

    adapters: Sequence[TrainedExperiment]
    grid: "GridSearch | None" = None
    """How they were found; None for a recipe without a grid."""


def plan_all(run: PipelineRun, base: BaseResult, data: PreparedData) -> PlanResult:
    """Plan the adapters for each choice of target modules; return the first plan.

    Raises:
        StageError: target modules match nothing.
        RecipeError: an adapter would be too large for the registry, or there are too few tuning
            examples for the search of a grid.
    """
    grid = run.recipe.experiments
    if grid.is_grid:
        choice = f"experiments has {grid.size} combinations"
        check_tuning_examples(choice, data.result.tuning_examples)
    plans = []
    for variant in target_variants(run.recipe):
        stages = run.stages.of(variant)
        plans.append(run.run_stage(tasks.plan, stages.plan(base, data)))
        check_adapter_sizes(run, base, plans[-1])
    return plans[0]


def train_adapters(run: PipelineRun, base: BaseResult, data: PreparedData) -> TrainedAdapters:
    """Train the adapters of each rank; of a grid, those that survive the search."""
    if not run.recipe.experiments.is_grid:
        adapters = rank_experiments(run.recipe)
        return TrainedAdapters([train_one(run, base, data, one) for one in adapters])
    search = _Search(run, base, data)
    for rung in search.rungs:
        search.halve(rung)
    return TrainedAdapters(search.train_survivors(), search.summary())


@dataclass
class _Search:
    """A search in progress."""

    run: PipelineRun
    base: BaseResult
    data: PreparedData
    experiments: dict[str, Experiment] = field(init=False)
    """Label → experiment, of the whole grid."""
    remaining: list[str] = field(init=False)
    """Labels of those that were not stopped."""
    halvings: "list[GridRung]" = field(default_factory=list)
    trials: dict[str, TrainStage] = field(default_factory=dict)
    """Label → its last trial."""
    diverged: list[str] = field(default_factory=list)
    """Labels of those that diverged after the last halving."""

    def __post_init__(self) -> None:
        self.experiments = {one.label: one for one in grid_experiments(self.run.recipe)}
        self.remaining = list(self.experiments)

    @property
    def rungs(self) -> list[Rung]:
        training = self.run.recipe.training
        kept = self.run.recipe.experiments.kept
        steps = training.total_steps
        return rungs(len(self.experiments), kept, steps, training.warmup_steps)

    def halve(self, rung: Rung) -> None:
        """Train the remaining experiments up to a step; stop the worse half."""
        from pipelines.comparison.grid import halve

        trials = {}
        for label in self.remaining:
            stage = self._try(self.experiments[label], rung.step)
            if stage is not None:
                trials[label] = stage
        if not trials:
            raise self._all_diverged()
        results = tune_all(self.run, self.base, self.data, list(trials.values()))
        if not any(isfinite(result.tuning_loss) for result in results):
            raise self._all_diverged()
        tuned: dict[str, TuneResult | None] = dict.fromkeys(self.remaining)
        tuned |= zip(trials, results, strict=True)
        halving = halve(rung.step, tuned, rung.kept)
        self.halvings.append(halving)
        self.trials |= trials
        self.remaining = list(halving.continuing)
        _print_halving(halving)

    def _try(self, experiment: Experiment, step: int) -> TrainStage | None:
        """Train an experiment up to a step; return None if its loss is no longer finite."""
        stage = self.run.stages.train(self.base, self.data, experiment, step)
        continue_from(stage, self.trials.get(experiment.label))
        try:
            run_training(self.run, experiment, stage, None)
        except StageError as error:
            if error.kind != DivergenceError.__name__:
                raise
            print_status(experiment.label, mark="✗", aside=f"diverged: {error}")
            return None
        return stage

    def train_survivors(self) -> list[TrainedExperiment]:
        """Train the remaining experiments to the end, in the order of the grid."""
        trained = []
        for label, experiment in self.experiments.items():
            if label not in self.remaining:
                continue
            stage = self.run.stages.train(self.base, self.data, experiment)
            continue_from(stage, self.trials[label])
            survivor = train_or_diverge(self.run, self.base, self.data, experiment)
            if survivor is None:
                self.diverged.append(label)
            else:
                trained.append(survivor)
        if not trained:
            raise self._all_diverged()
        self._remove_checkpoints()
        return trained

    def _all_diverged(self) -> RecipeError:
        rates = sorted({self.experiments[label].learning_rate for label in self.remaining})
        return RecipeError(
            f"training diverged in every experiment that was left ({', '.join(self.remaining)}; "
            f"learning rates {', '.join(map(str, rates))}); name lower rates in experiments, or "
            "more survivors"
        )

    def summary(self) -> "GridSearch":
        """Return how the experiments were searched."""
        from pipelines.comparison.grid import AdapterSettings, GridSearch

        experiments = {}
        for label, one in self.experiments.items():
            assert one.rank is not None and one.target_modules is not None, "set in a grid"
            experiments[label] = AdapterSettings(
                rank=one.rank, learning_rate=one.learning_rate, target_modules=one.target_modules
            )
        return GridSearch(
            experiments=experiments,
            steps=self.run.recipe.training.total_steps,
            rungs=tuple(self.halvings),
            diverged=tuple(self.diverged),
        )

    def _remove_checkpoints(self) -> None:
        """Remove the checkpoints of all trials, from which nothing continues any more."""
        for rung in self.rungs:
            for experiment in self.experiments.values():
                trial = self.run.stages.train(self.base, self.data, experiment, rung.step)
                shutil.rmtree(trial.folder / CHECKPOINTS, ignore_errors=True)


def continue_from(stage: TrainStage, trial: TrainStage | None) -> None:
    """Let a training resume from the checkpoint of a shorter trial, unless it has its own.

    If the trial has none any more, or if weights of earlier steps are to be saved too, the training
    starts from the beginning, with the same outcome.

    Args:
        stage: of the training, which has not begun.
        trial: of its beginning; None if there is none.
    """
    if trial is None or (stage.folder / RESULT).exists() or _has_snapshot_within(stage, trial):
        return
    target = stage.folder / CHECKPOINTS
    if target.exists() or not (trial.folder / CHECKPOINTS).is_dir():
        return
    stage.folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trial.folder / METRICS, stage.folder / METRICS)
    with atomic_folder(target) as aside:
        shutil.copytree(trial.folder / CHECKPOINTS, aside, dirs_exist_ok=True)


def _has_snapshot_within(stage: TrainStage, trial: TrainStage) -> bool:
    """Return whether a training saves the weights of a step that a trial has already taken."""
    assert stage.options is not None and trial.inputs.first_steps is not None, "both are trainings"
    return any(step <= trial.inputs.first_steps for step in stage.options.snapshots)


def _print_halving(halving: "GridRung") -> None:
    """Print the loss of each experiment, and whether it continues."""
    for trial in halving.trials:
        loss = "diverged" if trial.tuning_loss is None else f"loss {trial.tuning_loss:.4f}"
        behind = ""
        if trial.behind is not None:
            ends = f"{trial.behind.low:+.4f}, {trial.behind.high:+.4f}"
            behind = f", {trial.behind.mean:+.4f} ({ends}) behind the best"
        outcome = "continues" if trial.continues else "stops"
        text = f"{trial.label} {outcome} after step {halving.step}: {loss}{behind}"
        print_status(text, mark="✓" if trial.continues else "✗")
