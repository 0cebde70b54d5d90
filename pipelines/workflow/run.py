"""One execution of a recipe: its stages, how long each took, and what was trained."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.config.experiments import EvaluatedModel, Experiment
from pipelines.config.recipe import Recipe
from pipelines.console import print_status
from pipelines.runtime.interfaces.kinds import Inputs, Result
from pipelines.runtime.interfaces.plan_result import PlanResult
from pipelines.runtime.interfaces.results import StageTime, TrainResult
from pipelines.runtime.stage import Stage, snapshot
from pipelines.workflow.stages import Stages, TrainStage


@dataclass(frozen=True)
class TrainedExperiment:
    """An experiment after its training."""

    experiment: Experiment
    stage: TrainStage
    result: TrainResult

    @property
    def output(self) -> str:
        """Folder of the stage with the weights: model or adapter."""
        return "model" if self.experiment.method == "full" else "adapter"

    def evaluated_model(self, step: int | None = None) -> EvaluatedModel:
        """Return it as a model to score, with its final weights or those after `step` steps."""
        label = self.experiment.label
        weights = self.result.saved.adapter_sha256 or self.stage.key
        folder = self.stage.folder
        if step is not None:
            label = f"{label}@{step}"
            weights = f"{self.stage.key}@{step}"
            folder = folder / snapshot(step)
        return EvaluatedModel(
            label,
            quantized=self.stage.inputs.quantization != "none",
            weights=weights,
            output=self.output,
            folder=str(folder / self.output),
            experiment=self.experiment,
            step=step,
            saved_step=step or self.result.saved_step,
            is_complete=step is None,
        )


def unique(stages: Sequence[Stage[Inputs, Result]]) -> list[Stage[Inputs, Result]]:
    """Return one stage for each key: models with the same weights have the same scores."""
    return list({stage.key: stage for stage in stages}.values())


@dataclass
class PipelineRun:
    """One execution of a recipe: its stages, and how long each took."""

    recipe: Recipe
    stages: Stages
    started: float = field(default_factory=time.monotonic)
    timings: list[StageTime] = field(default_factory=list)
    plan: PlanResult | None = None
    """What the plan reported; None before that."""
    flow_run: str = ""
    """Id of the Prefect flow run; empty outside one."""

    @property
    def folder(self) -> Path:
        """Folder of the run's summary and report."""
        return self.stages.root / self.recipe.name

    def run_stage(self, task: Any, stage: Stage[Inputs, Result], *arguments: Any) -> Result:
        """Run a stage as a Prefect task, or reuse its cached result; print and record the time.

        Prefect caches the result, but not the files of the stage. They are verified first: if one
        is missing or changed, the stage runs again, whatever Prefect's cache contains.
        """
        started = time.monotonic()
        is_cached = stage.result() is not None
        result: Result = task.with_options(refresh_cache=not is_cached)(stage, *arguments)
        self._record_stage(stage, time.monotonic() - started, cached=is_cached)
        return result

    def run_stages(
        self, task: Any, stages: Sequence[Stage[Inputs, Result]], *arguments: Any
    ) -> None:
        """Run the unfinished ones of several stages in one process; print and record the times."""
        started = time.monotonic()
        missing = unique([stage for stage in stages if stage.result() is None])
        if missing:
            task(missing, *arguments)
        for stage in stages:
            if stage in missing:
                result = stage.result()
                seconds = 0.0 if result is None or result.seconds is None else result.seconds
                self._record_stage(stage, seconds, cached=False)
            else:
                self._record_stage(stage, time.monotonic() - started, cached=True)

    def _record_stage(self, stage: Stage[Any, Any], seconds: float, *, cached: bool) -> None:
        name = f"{stage.kind} {stage.label}"
        self.record(name, seconds, cached=cached, folder=str(stage.folder))
        print_status(name, mark="✓", aside="cached" if cached else f"{seconds:.0f} s")

    def record(self, name: str, seconds: float, *, cached: bool = False, folder: str = "") -> None:
        """Record how long a stage took."""
        seconds = round(seconds, 2)
        self.timings.append(StageTime(name=name, seconds=seconds, cached=cached, folder=folder))

    @property
    def seconds(self) -> float:
        """Duration of the run so far."""
        return round(time.monotonic() - self.started, 2)
