"""The workflow, from a recipe to a compared, checked and registered adapter. Start reading here.

data ─► base ─► train the control and each rank ─► evaluate all ─► compare ─► report ─► register ─► alias
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from math import inf

from prefect import flow

from pipelines.config.experiments import (
    CONTROL,
    EvaluatedModel,
    Experiment,
    control_experiments,
    learning_rate_experiments,
    rank_experiments,
)
from pipelines.config.recipe import find_recipe, load_recipe
from pipelines.console import print_status
from pipelines.errors import DivergenceError, MemoryExceededError, RecipeError, StageError
from pipelines.orchestration.cancellation import (
    end_with_worker,
    hold_lock,
    kill_leftover_processes,
    mark_interrupted_run_cancelled,
)
from pipelines.paths import runs_root
from pipelines.planning.fitting import what_would_fit
from pipelines.runtime import launcher
from pipelines.runtime.sharding import check_launch, check_path, keep_to_device
from pipelines.runtime.stage import Stage
from pipelines.workflow import tasks
from pipelines.workflow.incumbent import Champion, find_champion
from pipelines.workflow.publishing import publish
from pipelines.workflow.run import Data, Figures, Run, Trained
from pipelines.workflow.stages import Stages, group_by_base
from pipelines.workflow.summary import Tuning, summarize

LEAST_TO_TUNE_ON = 4


@flow(
    name="finetune",
    description=__doc__,
    on_running=[end_with_worker, hold_lock],
    on_cancellation=[kill_leftover_processes],
    on_crashed=[kill_leftover_processes, mark_interrupted_run_cancelled],
)
def finetune(recipe: str, ranks: list[int] = []) -> str:  # noqa: B006 - Prefect's form wants a plain list
    """Run a recipe from data to registered adapter; return the path of its summary.json.

    Args:
        recipe: a YAML file, or the name of one in pipelines/recipes.
        ranks: replaces the recipe's ranks where not empty.
    """
    settings = load_recipe(recipe, ranks=ranks)
    check_launch(settings)
    keep_to_device(settings.launch.config)
    run = Run(settings, Stages(settings, runs_root(), find_recipe(recipe).parent))
    base = run.step(tasks.prepare_base, run.stages.base())
    check_path(settings, base)
    data_stage = run.stages.data(base)
    data = (data_stage, run.step(tasks.prepare_data, data_stage))
    run.plan = run.step(tasks.plan, run.stages.plan(base, data))
    control, tried, tuning = train_control(run, base, data)
    adapters = [train_one(run, base, data, arm) for arm in rank_experiments(settings)]
    others = [
        *tried,
        *(train_one(run, base, data, arm) for arm in learning_rate_experiments(settings)),
    ]
    subjects = [
        *bases(run),
        *(one.subject() for one in (*control, *adapters)),
        *frontier(run, [*control, *adapters], others),
    ]
    evaluated = evaluate_all(run, base, data, subjects)
    champion = find_champion(run, base, adapters)
    if champion is not None and champion.subject is not None:
        champion, scored = evaluate_champion(run, base, data, champion)
        evaluated |= scored
    summary = summarize(run, base, data[1], [*control, *adapters], (tuning, champion), evaluated)
    return str(publish(run, summary))


def train_one(run: Run, base: Figures, data: Data, arm: Experiment) -> Trained:
    """Train one arm, which takes all processes; where its memory does not suffice, say what would need less."""
    stage = run.stages.train(base, data, arm)
    try:
        return Trained(
            arm,
            stage,
            run.step(
                tasks.train,
                stage,
                run.recipe.launch,
                run.recipe.registry.experiment or run.recipe.name,
            ),
        )
    except StageError as error:
        if error.kind != MemoryExceededError.__name__:
            raise
        raise StageError(f"{error}; {what_would_fit(run.plan, arm.label)}", error.kind) from error


def train_control(
    run: Run, base: Figures, data: Data
) -> tuple[list[Trained], list[Trained], Tuning]:
    """Train the control at each of its rates; return the one of the lowest tuning loss, if any is wanted, the others, and the losses.

    A rate of several at which training diverged has no loss, and no part in the rest.
    """
    arms = control_experiments(run.recipe)
    if len(arms) > 1 and data[1]["tuning_examples"] < LEAST_TO_TUNE_ON:
        raise RecipeError(
            f"control.learning_rate names {len(arms)} rates, and the held-out groups leave {data[1]['tuning_examples']} examples to choose "
            f"on, of at least {LEAST_TO_TUNE_ON}; lower data.validation_examples, bring more rows, or name one rate"
        )
    if len(arms) < 2:
        return [train_one(run, base, data, arm) for arm in arms], [], {}
    tried = [one for arm in arms if (one := train_or_diverge(run, base, data, arm)) is not None]
    losses = {
        one.arm.learning_rate: run.step(tasks.tune, run.stages.tune(base, data, one.stage))[
            "tuning_loss"
        ]
        for one in tried
    }
    tuning = {arm.learning_rate: losses.get(arm.learning_rate, inf) for arm in arms}
    if not losses:
        raise RecipeError(
            f"the control diverged at each of its rates ({', '.join(f'{rate:g}' for rate in tuning)}); name lower ones"
        )
    best = min(tried, key=lambda one: losses[one.arm.learning_rate])
    return (
        [replace(best, arm=replace(best.arm, label=CONTROL))],
        [one for one in tried if one is not best],
        tuning,
    )


def train_or_diverge(run: Run, base: Figures, data: Data, arm: Experiment) -> Trained | None:
    """Train one arm of several; None where its loss did not stay finite."""
    try:
        return train_one(run, base, data, arm)
    except StageError as error:
        if error.kind != DivergenceError.__name__:
            raise
        print_status(arm.label, mark="✗", aside=f"diverged: {error}")
        return None


def bases(run: Run) -> list[EvaluatedModel]:
    """Return the base in full precision, and as the adapters see it where that is another."""
    plain = [EvaluatedModel("base", quantized=False)]
    return (
        plain
        if run.recipe.base_model.quantization == "none"
        else [*plain, EvaluatedModel("base-nf4", quantized=True)]
    )


def frontier(run: Run, main: Sequence[Trained], others: Sequence[Trained]) -> list[EvaluatedModel]:
    """Return what is scored besides: snapshots of the main arms, other rates, and cuts of the highest rank."""
    snapshots = [one.subject(step) for one in main for step in one.arm.snapshots]
    highest = max(
        (one for one in main if one.arm.label != CONTROL), key=lambda one: one.arm.rank or 0
    )
    cuts = []
    for rank in run.recipe.frontier.cuts:
        stage = run.stages.cut(highest.stage, highest.figures, rank)
        run.step(tasks.cut, stage)
        label, folder = f"{highest.arm.label}→{rank}", str(stage.folder / "adapter")
        cuts.append(
            replace(
                highest.subject(),
                label=label,
                weights=stage.key,
                folder=folder,
                cut=rank,
                whole=False,
            )
        )
    return [*snapshots, *(replace(one.subject(), whole=False) for one in others), *cuts]


def evaluate_champion(
    run: Run, base: Figures, data: Data, champion: Champion
) -> tuple[Champion, dict[EvaluatedModel, Stage]]:
    """Score the registered champion on the same items; one that cannot be scored says why, and the rest of the run goes on."""
    assert champion.subject is not None, "a champion at hand is scored already"
    try:
        return champion, evaluate_all(run, base, data, [champion.subject])
    except StageError as error:
        return replace(champion, subject=None, objection=str(error)), {}


def evaluate_all(
    run: Run, base: Figures, data: Data, subjects: Sequence[EvaluatedModel]
) -> dict[EvaluatedModel, Stage]:
    """Score every model; those over one base share a process, and a few processes work side by side."""
    stages = {subject: run.stages.evaluate(base, data, subject) for subject in subjects}
    at_once = run.recipe.launch.evaluations_at_once
    with (
        tasks.evaluation_slots(list(stages.values()), at_once),
        ThreadPoolExecutor(at_once) as pool,
    ):
        parts = group_by_base(list(stages.values()), at_once)
        waiting = [
            pool.submit(copy_context().run, run.step_together, tasks.evaluate, part, at_once, place)
            for place, part in enumerate(parts)
        ]
        try:
            for one in waiting:
                one.result()
        except (
            BaseException
        ):  # Ctrl-C, a cancellation, or one that failed: the others need not end first
            pool.shutdown(wait=False, cancel_futures=True)
            launcher.end_all()
            raise
    return stages
