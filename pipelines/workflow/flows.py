"""The workflow, from a recipe to a compared, checked and registered adapter. Start reading here.

data ─► base ─► train the control and each rank ─► evaluate all ─► compare ─► report ─► register
                (of a grid, those that survive a search)
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal
from uuid import UUID

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from pipelines.config.experiments import (
    CONTROL,
    EvaluatedModel,
    Experiment,
    learning_rate_experiments,
)
from pipelines.config.recipe import find_recipe, load_recipe
from pipelines.config.steps import resolve_steps
from pipelines.console import print_status
from pipelines.data.data_warnings import data_warnings
from pipelines.errors import RecipeError, StageError
from pipelines.orchestration.cancellation import (
    hold_lock,
    kill_leftover_processes,
    mark_interrupted_run_cancelled,
    outlive_worker,
)
from pipelines.orchestration.concurrency import hold_slots, recipe_slot
from pipelines.orchestration.events import announce_failure
from pipelines.orchestration.own_state import follow_state
from pipelines.orchestration.redaction import (
    errors_without_credentials,
    remove_credentials_from_log,
)
from pipelines.paths import runs_root, tracking_account
from pipelines.runtime import launcher
from pipelines.runtime.interfaces.results import BaseResult
from pipelines.runtime.sharding import check_forward_path, check_launch, hide_gpus_if_on_cpu
from pipelines.workflow import tasks
from pipelines.workflow.champion import Champion, find_champion
from pipelines.workflow.completed import (
    completed_run,
    current_inputs_digest,
    inputs_digest,
    record_completed,
)
from pipelines.workflow.grid_search import plan_all, train_adapters
from pipelines.workflow.publishing import check_access, publish
from pipelines.workflow.run import PipelineRun, TrainedExperiment, unique
from pipelines.workflow.stages import EvaluateStage, PreparedData, Stages, group_by_base
from pipelines.workflow.summary import RunResults, summarize
from pipelines.workflow.training import train_control, train_one
from pipelines.workflow.training_dtype import resolve_dtype

Promote = Literal["as in the recipe", "auto", "propose"]
AS_IN_RECIPE = "as in the recipe"
DESCRIPTION = (
    "Trains the adapters of a recipe and a control on the same data, measures what each of them "
    "learned and what it forgot, and registers the adapters that pass the recipe's gate."
)
"""On Prefect's pages."""


def run_name() -> str:
    """Return the name of the current flow run: recipe, ranks, and the data if they are given."""
    parameters = flow_run.parameters
    data = parameters["data"]
    try:
        settings = load_recipe(parameters["recipe"], ranks=parameters["ranks"], data=data)
    except RecipeError:  # the run reports it
        return Path(parameters["recipe"]).stem
    ranks = ", ".join(map(str, settings.lora.ranks))
    name = f"{settings.name} rank {ranks}"
    return f"{name} on {data}" if data else name


@flow(
    name="finetune",
    flow_run_name=run_name,
    description=DESCRIPTION,
    on_running=[outlive_worker, hold_lock],
    on_failure=[announce_failure],
    on_cancellation=[kill_leftover_processes],
    on_crashed=[kill_leftover_processes, mark_interrupted_run_cancelled, announce_failure],
)
def finetune(
    recipe: str,
    ranks: list[int] = [],  # noqa: B006 - Prefect's form needs a plain list
    steps: int = 0,
    data: str = "",
    promote: Promote = "as in the recipe",
    only_if_changed: bool = False,
) -> str | State[str]:
    """Run a recipe from data to registered adapter; return the path of its summary.json.

    Args:
        recipe: a YAML file, or the name of one in pipelines/recipes.
        ranks: replaces the recipe's ranks if not empty.
        steps: replaces the length of a training if not 0, in optimizer steps.
        promote: whether a passing adapter becomes champion at once, or waits for a person.
        data: replaces the recipe's data.source if not empty.
        only_if_changed: do nothing if the last completed run had the same recipe and data.
    """
    remove_credentials_from_log()
    os.environ.update(tracking_account())
    chosen = "" if promote == AS_IN_RECIPE else promote
    settings = load_recipe(recipe, ranks=ranks, steps=steps, data=data, promote=chosen)
    stages = Stages(settings, runs_root(), find_recipe(recipe).parent)
    run = PipelineRun(settings, stages, flow_run=str(flow_run.id or ""))
    with (
        errors_without_credentials(),
        follow_state(flow_run_id()),
        hold_slots([recipe_slot(settings.name)], print_status),
    ):
        if only_if_changed:
            last = completed_run(run)
            if last is not None and last.inputs == current_inputs_digest(run):
                since = f"the run {last.flow_run!r} of {last.finished}"
                return Completed(message=f"recipe and data are unchanged since {since}")
        return str(compare_ranks(run))


def flow_run_id() -> UUID | None:
    """Return the id of the current flow run; None outside one."""
    return UUID(str(flow_run.id)) if flow_run.id else None


def compare_ranks(run: PipelineRun) -> Path:
    """Train the control and the adapters of a recipe, compare and register them.

    Returns:
        The path of summary.json.
    """
    loaded = run
    settings = run.recipe
    prepare_launch(run)
    base = run.run_stage(tasks.prepare_base, run.stages.base())
    check_forward_path(settings, base)
    data_stage = run.stages.data(base)
    data = PreparedData(data_stage, run.run_stage(tasks.prepare_data, data_stage))
    settings = resolve_steps(settings, data.result.train_examples)
    settings = resolve_dtype(settings, run.stages, partial(run.run_stage, tasks.measure_processor))
    run = replace(run, recipe=settings, stages=run.stages.of(settings))
    warnings = check_data(run, base, data)
    run.plan = plan_all(run, base, data)

    control = train_control(run, base, data)
    found = train_adapters(run, base, data)
    adapters = found.adapters
    compared = [*control.chosen, *adapters]
    others = [*control.others]
    others += train_all(run, base, data, learning_rate_experiments(settings))

    models = models_to_score(run, compared, others)
    evaluated = evaluate_all(run, base, data, models)
    champion = find_champion(run, base, data.result, adapters)
    if champion is not None and champion.model is not None:
        champion, scored = evaluate_champion(run, base, data, champion)
        evaluated |= scored

    results = RunResults(
        base, data.result, warnings, control, adapters, champion, evaluated, found.grid
    )
    path = publish(run, summarize(run, results))
    files = evaluated[models[0]].inputs.files
    inputs = inputs_digest(loaded.recipe, sources=data_stage.inputs.sources, files=files)
    record_completed(loaded, inputs, str(flow_run.name))
    return path


def prepare_launch(run: PipelineRun) -> None:
    """Check the launch and the access to the registry; hide the GPUs from a launch on the CPU."""
    check_launch(run.recipe)
    hide_gpus_if_on_cpu(run.recipe.launch.config)
    check_access(run)


def check_data(run: PipelineRun, base: BaseResult, data: PreparedData) -> tuple[str, ...]:
    """Search the training data for the evaluation's items; print and return all warnings."""
    check = run.run_stage(tasks.check_data, run.stages.check(base, data))
    warnings = data_warnings(data.result, check, run.recipe.data)
    tasks.show_data(data.result, warnings, recipe=run.recipe.name)
    return warnings


def train_all(
    run: PipelineRun, base: BaseResult, data: PreparedData, experiments: Sequence[Experiment]
) -> list[TrainedExperiment]:
    """Train experiments one after the other; each uses all processes."""
    return [train_one(run, base, data, experiment) for experiment in experiments]


def models_to_score(
    run: PipelineRun, compared: Sequence[TrainedExperiment], others: Sequence[TrainedExperiment]
) -> list[EvaluatedModel]:
    """Return the bases, the compared experiments, and the models that only the frontier shows."""
    models = bases(run)
    models += [trained.evaluated_model() for trained in compared]
    models += frontier_models(run, compared, others)
    return models


def bases(run: PipelineRun) -> list[EvaluatedModel]:
    """Return the base in full precision, and also quantized if the adapters see it that way."""
    models = [EvaluatedModel("base", quantized=False)]
    if run.recipe.base_model.quantization != "none":
        models.append(EvaluatedModel("base-nf4", quantized=True))
    return models


def frontier_models(
    run: PipelineRun, compared: Sequence[TrainedExperiment], others: Sequence[TrainedExperiment]
) -> list[EvaluatedModel]:
    """Return the models that only the frontier shows.

    These are snapshots of the compared experiments, other learning rates, and truncations of the
    highest rank.
    """
    models = []
    for trained in compared:
        models += [trained.evaluated_model(step) for step in trained.experiment.snapshots]
    for trained in others:
        models.append(replace(trained.evaluated_model(), is_complete=False))
    adapters = [trained for trained in compared if trained.experiment.label != CONTROL]
    highest = max(adapters, key=lambda trained: trained.experiment.rank or 0)
    for rank in run.recipe.frontier.cuts:
        models.append(truncate(run, highest, rank))
    return models


def truncate(run: PipelineRun, trained: TrainedExperiment, rank: int) -> EvaluatedModel:
    """Truncate a trained adapter to a lower rank; return it as a model to score."""
    stage = run.stages.truncate(trained.stage, trained.result, rank)
    run.run_stage(tasks.truncate, stage)
    return replace(
        trained.evaluated_model(),
        label=f"{trained.experiment.label}→{rank}",
        weights=stage.key,
        folder=str(stage.folder / "adapter"),
        truncated_rank=rank,
        is_complete=False,
    )


def evaluate_champion(
    run: PipelineRun, base: BaseResult, data: PreparedData, champion: Champion
) -> tuple[Champion, dict[EvaluatedModel, EvaluateStage]]:
    """Score the registered champion on the same items.

    If that fails, return the reason as its objection, and continue with the rest of the run.
    """
    assert champion.model is not None, "one of the adapters is the champion; it is scored already"
    try:
        return champion, evaluate_all(run, base, data, [champion.model])
    except StageError as error:
        return replace(champion, model=None, objection=str(error)), {}


def evaluate_all(
    run: PipelineRun, base: BaseResult, data: PreparedData, models: Sequence[EvaluatedModel]
) -> dict[EvaluatedModel, EvaluateStage]:
    """Score every model.

    Models with the same base share a process, and a few processes run at the same time.
    """
    stages = {model: run.stages.evaluate(base, data, model) for model in models}
    at_once = run.recipe.launch.evaluations_at_once
    different = unique(list(stages.values()))
    slots = tasks.evaluation_slots(different, at_once)
    with slots, ThreadPoolExecutor(at_once) as pool:
        futures = []
        for index, group in enumerate(group_by_base(different, at_once)):
            context = copy_context()
            futures.append(
                pool.submit(context.run, run.run_stages, tasks.evaluate, group, at_once, index)
            )
        try:
            for future in futures:
                future.result()
        except BaseException:  # Ctrl-C, a cancellation or a failure: do not wait for the others
            pool.shutdown(wait=False, cancel_futures=True)
            launcher.end_all()
            raise
    return stages
