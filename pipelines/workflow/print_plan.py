"""`lora plan`: prepare what the plan needs, and print what would be trained and its cost."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

from pipelines.config.experiments import CONTROL, grid_experiments, target_variants
from pipelines.config.halving import rungs
from pipelines.config.recipe import Recipe
from pipelines.config.steps import resolve_steps
from pipelines.planning.cluster import Cluster
from pipelines.planning.cluster_tables import (
    GIB,
    LEVELS,
    checkpoints_table,
    memory_of,
    scaling_table,
    traffic_table,
)
from pipelines.planning.fitting import memory_terms
from pipelines.runtime.interfaces.plan_result import (
    Configuration,
    PlanResult,
    RunCost,
    StoredWeights,
    TargetKind,
)
from pipelines.runtime.launcher import ensure_result
from pipelines.runtime.sharding import check_forward_path, check_launch
from pipelines.workflow.stages import PreparedData, Stages
from pipelines.workflow.training_dtype import resolve_dtype

MIN_LISTED_FRACTION = 0.001
"""Fraction of all weights above which a kind of weight has a separate line."""
PROCESSES = (1, 2, 4, 8)
"""Numbers of GPUs for which the memory of every configuration is printed."""
console = Console()


def print_plan(recipe: Recipe, stages: Stages, cluster: Cluster) -> None:
    """Prepare base and data, which the run reuses, and print the plan.

    The cluster options add further tables.
    """
    check_launch(recipe)
    base = ensure_result(stages.base(), threads=1)
    check_forward_path(recipe, base)
    data_stage = stages.data(base)
    data = PreparedData(data_stage, ensure_result(data_stage, threads=1))
    recipe = resolve_steps(recipe, data.result.train_examples)
    recipe = resolve_dtype(recipe, stages, partial(ensure_result, threads=1))
    stages = stages.of(recipe)
    plans = []
    for variant in target_variants(recipe):
        plans.append(ensure_result(stages.of(variant).plan(base, data), threads=1))
    plan = plans[0]
    console.print(f"{base.id}: {base.forward}", highlight=False)
    for variant, one in zip(target_variants(recipe), plans, strict=True):
        chosen = f"; {variant.lora.target_modules}" if len(plans) > 1 else ""
        console.print(_targets_table(one.targets, f"{recipe.lora.init}{chosen}"))
    if recipe.experiments.is_grid:
        console.print(_grid_table(recipe))
    console.print(_weights_table(plan.weights))
    console.print(_runs_table(recipe, plan, base.weights))
    uncounted = plan.runs[CONTROL].uncounted
    if uncounted:
        names = ", ".join(uncounted)
        console.print(f"at least: the activations of {names} are not counted", style="yellow")
    if cluster.gpu_gb is not None:
        console.print(_fits_table(plan, max(recipe.lora.ranks), cluster.gpu_gb))
        console.print(scaling_table(plan, cluster, cluster.gpu_gb))
    if cluster.gpus is not None:
        console.print(traffic_table(plan, cluster, cluster.gpus))
        console.print(checkpoints_table(plan, cluster, cluster.gpus))


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left")


def _targets_table(targets: Iterable[TargetKind], init: str) -> Table:
    table = _table(
        f"Modules with an adapter; init {init}",
        *("module", "layers", "out × in", "rank", "scale", "trained weights"),
    )
    for target in targets:
        table.add_row(
            target.name,
            str(target.count),
            f"{target.out_features} × {target.in_features}",
            str(target.rank),
            f"{target.scale:g}",
            f"{target.trained_weights:,}",
        )
    return table


def _grid_table(recipe: Recipe) -> Table:
    """Return after how many steps a search of the grid stops which number of experiments."""
    training = recipe.training
    count = len(grid_experiments(recipe))
    found = rungs(count, recipe.experiments.kept, training.total_steps, training.warmup_steps)
    table = _table(f"Search of {count} experiments", "after step", "trained", "continue")
    for rung in found:
        table.add_row(str(rung.step), str(count), str(rung.kept))
        count = rung.kept
    table.add_row(str(training.total_steps), str(count), "compared")
    return table


def _weights_table(weights: Sequence[StoredWeights]) -> Table:
    """Return how each kind of weight is stored and adapted; largest first, small ones summed."""
    table = _table(
        "All weights",
        *("weights of the base", "tensors", "weights", "share", "stored", "adapter"),
    )
    total = sum(kind.weights for kind in weights)
    minimum = MIN_LISTED_FRACTION * total
    listed = []
    others = []
    for kind in sorted(weights, key=lambda kind: -kind.weights):
        if kind.weights >= minimum:
            listed.append(kind)
        else:
            others.append(kind)
    if others:
        listed.append(_sum_of(others))
    for kind in listed:
        table.add_row(
            kind.name,
            f"{kind.count:,}",
            f"{kind.weights:,}",
            f"{kind.weights / total:.1%}",
            kind.stored,
            "yes" if kind.adapted else "no",
        )
    return table


def _sum_of(kinds: Sequence[StoredWeights]) -> StoredWeights:
    """Return one line for several kinds of weight."""
    return StoredWeights(
        name="others",
        stored="/".join(sorted({kind.stored for kind in kinds})),
        adapted=all(kind.adapted for kind in kinds),
        count=sum(kind.count for kind in kinds),
        weights=sum(kind.weights for kind in kinds),
    )


def _runs_table(recipe: Recipe, plan: PlanResult, base_weights: int) -> Table:
    """Return a column for each training and a row for each term of its memory."""
    training = recipe.training
    runs = list(plan.runs.values())
    title = (
        f"{recipe.name}: {training.total_steps} steps of {training.batch_size} examples on "
        f"{recipe.launch.processes} processes ({plan.setup.sharding}), "
        f"at most {plan.setup.tokens} tokens at once on each"
    )
    table = _table(title, "memory of a process", *plan.runs)
    for column in table.columns[1:]:
        column.justify = "right"

    def add_sizes(name: str, size_of: Callable[[RunCost], int]) -> None:
        table.add_row(name, *(_megabytes(size_of(run)) for run in runs))

    table.add_row("trained weights", *(f"{run.trained_weights:,}" for run in runs))
    table.add_row("share of all", *(f"{run.trained_weights / base_weights:.2%}" for run in runs))
    table.add_row("rank in the file", *(_file_rank(run) for run in runs))
    add_sizes("file", lambda run: run.file_bytes)
    table.add_section()
    terms = [memory_terms(run) for run in runs]
    for name in terms[0]:
        table.add_row(name, *(_megabytes(sizes[name]) for sizes in terms))
    table.add_section()
    add_sizes("while loading", lambda run: run.loading_bytes)
    add_sizes("memory at its peak", lambda run: run.memory_bytes)
    other = "without" if plan.setup.checkpointing else "with"
    add_sizes(f"{other} checkpointing", lambda run: run.other_checkpointing_bytes)
    if recipe.launch.processes > 1:
        table.add_section()
        add_sizes("sent to the others in a step", lambda run: run.sent_bytes)
    return table


def _file_rank(run: RunCost) -> str:
    return "–" if run.adapter is None else str(run.adapter.file_rank)


def _fits_table(plan: PlanResult, rank: int, gpu_gb: float) -> Table:
    """Return the memory of each way to train on GPUs of one size, and whether it fits."""
    ways: dict[tuple[str, str], dict[int, Configuration]] = {}
    for way in plan.scaling:
        by_count = ways.setdefault((way.method, way.sharding), {})
        by_count[way.processes] = way
    title = (
        f"On GPUs of {gpu_gb:g} GB in bfloat16, rank {rank}, {plan.setup.tokens} tokens at "
        "once on each: GiB of a process; ✓ fits, 8 with the paged 8-bit AdamW that is used then, "
        "c with gradient checkpointing, 8c with both, × does not"
    )
    columns = [f"{count} GPU" if count == 1 else f"{count} GPUs" for count in PROCESSES]
    table = _table(title, "method", "sharding", *columns)
    for (method, sharding), by_count in ways.items():
        fits = [_fit(by_count[count], gpu_gb, plan.comfortable_share) for count in PROCESSES]
        table.add_row(method, sharding, *fits)
    return table


def _fit(way: Configuration, gpu_gb: float, comfortable: float) -> str:
    """Return whether a way fits, with what, and its memory in GiB."""
    for checkpointing in LEVELS:
        used, mark = memory_of(way, gpu_gb, comfortable, checkpointing=checkpointing)
        if used <= gpu_gb * GIB:
            return f"{mark or '✓'} {used / GIB:.1f}"
    return f"× {used / GIB:.1f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
