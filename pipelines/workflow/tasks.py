"""The stages as Prefect tasks: cached by key, run as child processes."""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.context import TaskRunContext

from pipelines.config.sections import LaunchSection
from pipelines.console import Watch, fan_out, print_status, training_progress
from pipelines.data.data_warnings import data_markdown
from pipelines.orchestration import concurrency, flow_log, own_state
from pipelines.orchestration.cancellation import started_by_worker
from pipelines.runtime import hosts, launcher
from pipelines.runtime.interfaces.plan_result import PlanResult
from pipelines.runtime.interfaces.results import (
    BaseResult,
    CheckResult,
    CutResult,
    DataResult,
    EvaluateResult,
    ProcessorResult,
    TrainResult,
    TuneResult,
)
from pipelines.tracking.live import live_run
from pipelines.workflow.stages import (
    BaseStage,
    CheckStage,
    CutStage,
    DataStage,
    EvaluateStage,
    PlanStage,
    ProcessorStage,
    TrainStage,
    TuneStage,
)


def stage_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Return the stage's key as cache key; Prefect's default is valid for one flow run only."""
    return str(parameters["stage"].key)


CACHED: dict[str, Any] = {
    "cache_key_fn": stage_key,
    "persist_result": True,
    "task_run_name": "{stage.kind.name} {stage.label}",
}


@task(name="prepare base model", **CACHED)
def prepare_base(stage: BaseStage) -> BaseResult:
    """Convert the base to Hugging Face format and fingerprint it (pipelines.models.base_model)."""
    return launcher.ensure_result(stage, threads=launcher.threads_each(1))


@task(name="measure processor", **CACHED)
def measure_processor(stage: ProcessorStage) -> ProcessorResult:
    """Measure products in float32 and in bfloat16 (pipelines.models.processor)."""
    return launcher.ensure_result(stage, threads=launcher.threads_each(1))


@task(name="prepare data", **CACHED)
def prepare_data(stage: DataStage) -> DataResult:
    """Load, apply the chat template, tokenize, mask and split (pipelines.data.preparation)."""
    return launcher.ensure_result(stage, threads=launcher.threads_each(1))


@task(name="check data", **CACHED)
def check_data(stage: CheckStage) -> CheckResult:
    """Search the training data for the evaluation's items (pipelines.evaluation.data_check)."""
    return launcher.ensure_result(stage, threads=launcher.threads_each(1))


@task(name="plan", **CACHED)
def plan(stage: PlanStage) -> PlanResult:
    """Match target modules, check ranks, and count weights and memory (pipelines.planning.plan)."""
    return launcher.ensure_result(stage, threads=launcher.threads_each(1))


@task(name="train", **CACHED)
def train(stage: TrainStage, settings: LaunchSection, mlflow_experiment: str | None) -> TrainResult:
    """Train an adapter or the control on all ranks (pipelines.training.train).

    It resumes from the last checkpoint. MLflow shows it while it runs, if an experiment is named.
    """
    result = stage.result()  # trained by hand, or for another Prefect server
    if result is not None:
        return result
    slots = concurrency.slot_names(settings.processes // settings.machines)
    with concurrency.hold_slots(slots, flow_log.log_and_print):
        result = stage.result()  # another run may have trained it in the meantime
        if result is not None:
            return result
        with (
            training_progress(stage.label, lines=not started_by_worker()) as on_terminal,
            flow_log.report_training(stage.label) as on_prefect,
            _on_mlflow(stage, mlflow_experiment) as on_mlflow,
            own_state.training_in(stage.folder),
        ):
            return hosts.train(
                stage,
                settings,
                watch=fan_out(on_terminal, on_prefect, on_mlflow),
                report=lambda text: flow_log.log_and_print(f"{stage.label}: {text}"),
            )


def _on_mlflow(stage: TrainStage, experiment: str | None) -> AbstractContextManager[Watch]:
    """Show a training in MLflow while it runs; a trial of a grid names no experiment."""
    if experiment is None:
        return nullcontext(fan_out())
    return live_run(stage, experiment, print_status)


@task(name="tune", task_run_name="tune {stages[0].label} …")
def tune(stages: list[TuneStage]) -> list[TuneResult]:
    """Compute the tuning losses of trained models in one process (pipelines.evaluation.tuning).

    Each model gets its own result; call this only for those without one.
    """
    slots = concurrency.slot_names(1) if concurrency.gpus() else []
    with concurrency.hold_slots(slots, flow_log.log_and_print):
        for stage in stages:
            stage.begin()
        argv = launcher.stage_argv(stages)
        return launcher.run_child(stages, argv, threads=launcher.threads_each(1))


@task(name="cut", **CACHED)
def truncate(stage: CutStage) -> CutResult:
    """Truncate an adapter to a lower rank (pipelines.models.truncate)."""
    return launcher.ensure_result(stage, threads=launcher.threads_each(1))


@task(name="evaluate", task_run_name="evaluate {stages[0].label} …")
def evaluate(stages: list[EvaluateStage], at_once: int, index: int) -> list[EvaluateResult]:
    """Score models that share a base in one process (pipelines.evaluation.evaluate).

    Each model gets its own result; call this only for those without one. If there are several
    GPUs, processes that run at the same time use one each, by their index.
    """
    for stage in stages:
        stage.begin()
    return launcher.run_child(
        stages,
        launcher.stage_argv(stages),
        threads=launcher.threads_each(at_once),
        worker_index=index % at_once,
    )


def evaluation_slots(stages: list[EvaluateStage], at_once: int) -> AbstractContextManager[None]:
    """Hold GPUs for scoring if a stage is not done.

    CPU cores are shared as the recipe configures.
    """
    needs_gpus = bool(concurrency.gpus()) and any(stage.result() is None for stage in stages)
    slots = concurrency.slot_names(at_once) if needs_gpus else []
    return concurrency.hold_slots(slots, print_status)


def show_data(data: DataResult, warnings: Sequence[str], *, recipe: str) -> None:
    """Print the warnings about the data, and show them on the flow run's page."""
    for warning in warnings:
        flow_log.log_and_print(f"data: {warning}")
    text = f"# {recipe}: in progress\n\n{data_markdown(data, warnings)}"
    create_markdown_artifact(
        text, key=artifact_key(recipe), description=f"{recipe}: the data of a run in progress"
    )


def show_comparison(text: str, decision: str, *, recipe: str) -> None:
    """Show the comparison on the flow run's page; it replaces the recipe's artifact."""
    title = f"{recipe}: {decision}"
    create_markdown_artifact(text, key=artifact_key(recipe), description=title)


def artifact_key(recipe: str) -> str:
    """Return the key of a recipe's artifact: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")
