"""One execution of a recipe: its stages, how long each took, and what was trained."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.config.experiments import EvaluatedModel, Experiment
from pipelines.config.recipe import Recipe
from pipelines.console import print_status
from pipelines.runtime.stage import Stage, snapshot
from pipelines.workflow import tasks
from pipelines.workflow.stages import Stages

Figures = dict[str, Any]
Data = tuple[Stage, Figures]
"""The stage that prepared the data, and what it reported."""


@dataclass(frozen=True)
class Trained:
    """One arm when it is trained."""

    arm: Experiment
    stage: Stage
    figures: Figures

    @property
    def output(self) -> str:
        """Which folder of the stage holds it: model or adapter."""
        return "model" if self.arm.method == "full" else "adapter"

    def subject(self, step: int | None = None) -> EvaluatedModel:
        """Return it as a model to be scored, as it was in the end or after `step` steps."""
        label, weights, folder = (
            self.arm.label,
            str(self.figures.get("adapter_sha256", self.stage.key)),
            self.stage.folder,
        )
        if step is not None:
            label, weights, folder = (
                f"{label}@{step}",
                f"{self.stage.key}@{step}",
                folder / snapshot(step),
            )
        quantized = self.stage.inputs["quantization"] != "none"
        return EvaluatedModel(
            label,
            quantized,
            weights,
            self.output,
            str(folder / self.output),
            self.arm,
            step,
            whole=step is None,
        )


@dataclass
class Run:
    """One execution of a recipe: its stages, and how long each took."""

    recipe: Recipe
    stages: Stages
    started: float = field(default_factory=time.monotonic)
    timings: list[dict[str, Any]] = field(default_factory=list)
    plan: Figures = field(default_factory=dict)
    """What the plan reported, once it has."""

    @property
    def folder(self) -> Path:
        """Where the run's summary and report go."""
        return self.stages.root / self.recipe.name

    def step(self, task: Any, stage: Stage, *arguments: Any) -> dict[str, Any]:
        """Run or reuse a stage, say so, and note the time."""
        name, begun = f"{stage.kind} {stage.label}", time.monotonic()
        figures, reused = tasks.run_or_reuse(task, stage, *arguments)
        seconds = self.note(name, begun, cached=reused, folder=str(stage.folder))
        print_status(name, mark="✓", aside="found again" if reused else f"{seconds:.0f} s")
        return figures

    def step_together(self, task: Any, stages: Sequence[Stage], *arguments: Any) -> None:
        """Run those of several stages that are not done, in one process; say so, and note the time of each."""
        begun, missing = time.monotonic(), [stage for stage in stages if stage.result() is None]
        if missing:
            task(missing, *arguments)
        for stage in stages:
            name, reused = f"{stage.kind} {stage.label}", stage not in missing
            seconds = (
                self.note(name, begun, cached=reused, folder=str(stage.folder))
                if reused
                else self._own_time(name, stage)
            )
            print_status(name, mark="✓", aside="found again" if reused else f"{seconds:.0f} s")

    def note(self, name: str, begun: float, *, cached: bool = False, folder: str = "") -> float:
        """Keep how long a stage took since the clock stood at `begun`; return the seconds."""
        seconds = round(time.monotonic() - begun, 2)
        self.timings.append({"name": name, "seconds": seconds, "cached": cached, "folder": folder})
        return seconds

    def _own_time(self, name: str, stage: Stage) -> float:
        """Keep the time that a stage itself says it took, beside others in one process."""
        seconds = float((stage.result() or {})["seconds"])
        self.timings.append(
            {"name": name, "seconds": seconds, "cached": False, "folder": str(stage.folder)}
        )
        return seconds

    def times(self) -> dict[str, Any]:
        """Return the stages so far and the time of the whole run, as the summary holds them."""
        return {"stages": self.timings, "seconds": round(time.monotonic() - self.started, 2)}
