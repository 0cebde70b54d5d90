"""The workflow, from a recipe to a compared, checked and registered adapter. Start reading here.

data ─► base ─► train the control and each rank ─► evaluate all ─► compare ─► report ─► register
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace

from prefect import flow

from pipelines.config.experiments import (
    CONTROL,
    EvaluatedModel,
    Experiment,
    learning_rate_experiments,
    rank_experiments,
)
from pipelines.config.recipe import find_recipe, load_recipe
from pipelines.config.steps import resolve_steps
from pipelines.data.data_warnings import data_warnings
from pipelines.errors import StageError
from pipelines.orchestration.cancellation import (
    end_with_worker,
    hold_lock,
    kill_leftover_processes,
    mark_interrupted_run_cancelled,
)
from pipelines.paths import runs_root
from pipelines.runtime import launcher
from pipelines.runtime.interfaces.results import BaseResult
from pipelines.runtime.sharding import check_forward_path, check_launch, hide_gpus_if_on_cpu
from pipelines.workflow import tasks
from pipelines.workflow.champion import Champion, find_champion
from pipelines.workflow.publishing import publish
from pipelines.workflow.run import PipelineRun, TrainedExperiment
from pipelines.workflow.stages import EvaluateStage, PreparedData, Stages, group_by_base
from pipelines.workflow.summary import RunResults, summarize
from pipelines.workflow.training import train_control, train_one


@flow(
    name="finetune",
    description=__doc__,
    on_running=[end_with_worker, hold_lock],
    on_cancellation=[kill_leftover_processes],
    on_crashed=[kill_leftover_processes, mark_interrupted_run_cancelled],
)
def finetune(recipe: str, ranks: list[int] = []) -> str:  # noqa: B006 - Prefect's form needs a plain list
    """Run a recipe from data to registered adapter; return the path of its summary.json.

    Args:
        recipe: a YAML file, or the name of one in pipelines/recipes.
        ranks: replaces the recipe's ranks if not empty.
    """
    settings = load_recipe(recipe, ranks=ranks)
    check_launch(settings)
    hide_gpus_if_on_cpu(settings.launch.config)
    run = PipelineRun(settings, Stages(settings, runs_root(), find_recipe(recipe).parent))
    base = run.run_stage(tasks.prepare_base, run.stages.base())
    check_forward_path(settings, base)
    data_stage = run.stages.data(base)
    data = PreparedData(data_stage, run.run_stage(tasks.prepare_data, data_stage))
    settings = resolve_steps(settings, data.result.train_examples)
    run = replace(run, recipe=settings, stages=replace(run.stages, recipe=settings))
    check = run.run_stage(tasks.check_data, run.stages.check(base, data))
    warnings = data_warnings(data.result, check, settings.data)
    tasks.show_data(data.result, warnings)
    run.plan = run.run_stage(tasks.plan, run.stages.plan(base, data))

    control = train_control(run, base, data)
    adapters = train_all(run, base, data, rank_experiments(settings))
    compared = [*control.chosen, *adapters]
    others = [*control.others]
    others += train_all(run, base, data, learning_rate_experiments(settings))

    models = bases(run)
    models += [trained.evaluated_model() for trained in compared]
    models += frontier_models(run, compared, others)
    evaluated = evaluate_all(run, base, data, models)
    champion = find_champion(run, base, adapters)
    if champion is not None and champion.model is not None:
        champion, scored = evaluate_champion(run, base, data, champion)
        evaluated |= scored

    results = RunResults(base, data.result, warnings, control, adapters, champion, evaluated)
    return str(publish(run, summarize(run, results)))


def train_all(
    run: PipelineRun, base: BaseResult, data: PreparedData, experiments: Sequence[Experiment]
) -> list[TrainedExperiment]:
    """Train experiments one after the other; each uses all processes."""
    return [train_one(run, base, data, experiment) for experiment in experiments]


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
    slots = tasks.evaluation_slots(list(stages.values()), at_once)
    with slots, ThreadPoolExecutor(at_once) as pool:
        futures = []
        for index, group in enumerate(group_by_base(list(stages.values()), at_once)):
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
