"""The stages as Prefect tasks: cached by their key, run as child processes, called directly so that they can be ended."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.context import TaskRunContext

from pipelines.config.sections import LaunchSection
from pipelines.console import fan_out, print_status, training_progress
from pipelines.orchestration import concurrency, flow_log
from pipelines.orchestration.cancellation import by_worker
from pipelines.runtime import hosts, launcher
from pipelines.runtime.stage import Stage
from pipelines.tracking.live import live_run

Figures = dict[str, Any]


def stage_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Name the cached result after the stage's inputs; the default key would hold for one flow run only."""
    return str(parameters["stage"].key)


CACHED: dict[str, Any] = {
    "cache_key_fn": stage_key,
    "persist_result": True,
    "task_run_name": "{stage.kind} {stage.label}",
}


@task(name="prepare base model", **CACHED)
def prepare_base(stage: Stage) -> Figures:
    """Bring the base into Hugging Face format and fingerprint it."""
    return _perform(stage, "pipelines.models.base_model")


@task(name="prepare data", **CACHED)
def prepare_data(stage: Stage) -> Figures:
    """Load, template, tokenise, mask and split."""
    return _perform(stage, "pipelines.data.preparation")


@task(name="plan", **CACHED)
def plan(stage: Stage) -> Figures:
    """Match targets, check ranks, and count weights and memory."""
    return _perform(stage, "pipelines.planning.plan")


@task(name="train", **CACHED)
def train(stage: Stage, settings: LaunchSection, experiment: str) -> Figures:
    """Train an adapter or the control on all ranks; goes on from the last checkpoint. MLflow's experiment shows it meanwhile."""
    found = stage.result()  # made by hand, or for another server
    if found is not None:
        return found
    with concurrency.held(
        concurrency.slot_names(settings.processes // settings.machines), flow_log.log_and_print
    ):
        return stage.result() or _trained(
            stage, settings, experiment
        )  # another run may have trained it meanwhile


def _trained(stage: Stage, settings: LaunchSection, experiment: str) -> Figures:
    """Train, and show how far it is wherever that is looked for."""
    with (
        training_progress(stage.label, lines=not by_worker()) as shown,
        flow_log.reported(stage.label) as reported,
        live_run(stage, experiment, print_status) as logged,
    ):
        return hosts.train(
            stage,
            settings,
            fan_out(shown, reported, logged),
            lambda text: flow_log.log_and_print(f"{stage.label}: {text}"),
        )


@task(name="tune", **CACHED)
def tune(stage: Stage) -> Figures:
    """Find the loss of a control at one rate."""
    with concurrency.held(
        concurrency.slot_names(1) if concurrency.gpus() else [], flow_log.log_and_print
    ):
        return _perform(stage, "pipelines.evaluation.tuning")


@task(name="cut", **CACHED)
def cut(stage: Stage) -> Figures:
    """Cut an adapter to a lower rank."""
    return _perform(stage, "pipelines.models.truncate")


@task(name="evaluate", task_run_name="evaluate {stages[0].label} …")
def evaluate(stages: list[Stage], at_once: int, place: int) -> list[Figures]:
    """Score models that share a base in one process; each has a result of its own, so those that are done are not asked for.

    Processes at work at once take a GPU each, by their place, where there are several.
    """
    folders = [stage.begin() for stage in stages]
    argv = launcher.python_argv("pipelines.evaluation.evaluate", *folders)
    return launcher.run_together(
        stages, argv, threads=launcher.threads_each(at_once), place=place % at_once
    )


def evaluation_slots(stages: list[Stage], at_once: int) -> AbstractContextManager[None]:
    """Hold the GPUs on which stages are scored, if any is to be; cores are shared as far as the recipe says."""
    wanted = concurrency.gpus() and any(stage.result() is None for stage in stages)
    return concurrency.held(concurrency.slot_names(at_once) if wanted else [], print_status)


def show_comparison(table: str, decision: str) -> None:
    """Put the comparison's table on the flow run's page."""
    create_markdown_artifact(table, key="comparison", description=decision)


def run_or_reuse(step: Callable[..., Any], stage: Stage, *arguments: Any) -> tuple[Figures, bool]:
    """Return a stage's figures and whether they were there already.

    A cached result is a value and says nothing of files; so the stage's files are verified first, and where one is
    missing or changed the stage is run again whatever the cache holds.
    """
    whole = stage.result() is not None
    configured = step.with_options(refresh_cache=not whole)  # type: ignore[attr-defined]
    return configured(stage, *arguments), whole


def _perform(stage: Stage, module: str) -> Figures:
    return launcher.result_of(stage, module, threads=launcher.threads_each(1))
