"""`lora plan`: prepare what the plan needs, and print what would be trained and what it would cost."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.config.recipe import Recipe
from pipelines.models.verified import sentence
from pipelines.planning.cluster import (
    GIB,
    LEVELS,
    Cluster,
    checkpoints_table,
    memory_of,
    scaling_table,
    traffic_table,
)
from pipelines.planning.fitting import TERMS
from pipelines.runtime import launcher
from pipelines.runtime.sharding import check_launch, check_path
from pipelines.workflow.stages import Stages

LISTED = 0.001
"""Part of all weights from which a kind of them has a line of its own."""
console = Console()


def print_plan(recipe: Recipe, stages: Stages, cluster: Cluster) -> None:
    """Prepare base and data, which are kept for the run, and print the plan, and what the options of a cluster ask for besides."""
    check_launch(recipe)
    base = launcher.result_of(stages.base(), "pipelines.models.base_model", threads=1)
    check_path(recipe, base)
    data_stage = stages.data(base)
    data = (data_stage, launcher.result_of(data_stage, "pipelines.data.preparation", threads=1))
    plan = launcher.result_of(stages.plan(base, data), "pipelines.planning.plan", threads=1)
    console.print(f"{base['id']}: {sentence(base['forward'])}", highlight=False)
    console.print(_targets_table(plan["targets"], recipe.lora.init))
    console.print(_weights_table(plan["weights"]))
    console.print(_runs_table(recipe, plan, base["weights"]))
    uncounted = plan["runs"]["control"]["uncounted"]
    if uncounted:
        console.print(
            f"at least: the activations of {', '.join(uncounted)} are not counted", style="yellow"
        )
    if cluster.gpu_gb is not None:
        console.print(_fits_table(plan, max(recipe.lora.ranks), cluster.gpu_gb))
        console.print(scaling_table(plan, cluster, cluster.gpu_gb))
    if cluster.gpus is not None:
        console.print(traffic_table(plan, cluster, cluster.gpus))
        console.print(checkpoints_table(plan, cluster, cluster.gpus))


def _targets_table(targets: list[dict[str, Any]], init: str) -> Table:
    title = f"Modules with an adapter; init {init}"
    table = Table(
        "module",
        "layers",
        "out × in",
        "rank",
        "scale",
        "trained weights",
        title=title,
        title_justify="left",
    )
    for target in targets:
        table.add_row(
            target["name"],
            str(target["count"]),
            f"{target['out_features']} × {target['in_features']}",
            str(target["rank"]),
            f"{target['scale']:g}",
            f"{target['trained_weights']:,}",
        )
    return table


def _weights_table(weights: list[dict[str, Any]]) -> Table:
    """Print how each kind of weight is stored and whether it is adapted, the most numerous first; small ones in one line."""
    total = sum(kind["weights"] for kind in weights)
    table = Table(
        "weights of the base",
        "tensors",
        "weights",
        "share",
        "stored",
        "adapter",
        title="All weights",
        title_justify="left",
    )
    listed = sorted(
        (kind for kind in weights if kind["weights"] >= LISTED * total),
        key=lambda kind: -kind["weights"],
    )
    rest = [kind for kind in weights if kind["weights"] < LISTED * total]
    if rest:
        sums = {name: sum(kind[name] for kind in rest) for name in ("count", "weights")}
        stored = {kind["stored"] for kind in rest}
        adapted = {kind["adapted"] for kind in rest}
        listed.append(
            {
                "name": "others",
                **sums,
                "stored": "/".join(sorted(stored)),
                "adapted": adapted == {True},
            }
        )
    for kind in listed:
        share, adapter = f"{kind['weights'] / total:.1%}", "yes" if kind["adapted"] else "no"
        table.add_row(
            kind["name"],
            f"{kind['count']:,}",
            f"{kind['weights']:,}",
            share,
            kind["stored"],
            adapter,
        )
    return table


def _runs_table(recipe: Recipe, plan: dict[str, Any], base_weights: int) -> Table:
    """Print a column for each run and a row for each term of its memory."""
    training, setup, runs = recipe.training, plan["setup"], list(plan["runs"].values())
    title = (
        f"{recipe.name}: {training.steps} steps of {training.batch_size} examples on {recipe.launch.processes} processes "
        f"({setup['sharding']}), at most {setup['tokens']} tokens at once on each"
    )
    table = Table("memory of a process", *plan["runs"], title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("trained weights", *(f"{run['trained_weights']:,}" for run in runs))
    table.add_row("share of all", *(f"{run['trained_weights'] / base_weights:.2%}" for run in runs))
    table.add_row("rank in the file", *(str(run.get("file_rank", "–")) for run in runs))
    table.add_row("file", *(_megabytes(run["file_bytes"]) for run in runs), end_section=True)
    for term, name in TERMS.items():
        table.add_row(name, *(_megabytes(run[term]) for run in runs))
    table.add_section()
    table.add_row("while loading", *(_megabytes(run["loading_bytes"]) for run in runs))
    table.add_row("memory at its peak", *(_megabytes(run["memory_bytes"]) for run in runs))
    other = "without" if setup["checkpointing"] else "with"
    table.add_row(
        f"{other} checkpointing", *(_megabytes(run["other_checkpointing_bytes"]) for run in runs)
    )
    if recipe.launch.processes > 1:
        table.add_section()
        table.add_row(
            "sent to the others in a step", *(_megabytes(run["sent_bytes"]) for run in runs)
        )
    return table


def _fits_table(plan: dict[str, Any], rank: int, gpu_gb: float) -> Table:
    """Print each way of training on GPUs of one size: its memory, and whether it fits as it is or with checkpointing."""
    ways: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for way in plan["alternatives"]:
        ways.setdefault((way["method"], way["sharding"]), {})[way["processes"]] = way
    counts = sorted(next(iter(ways.values())))
    title = (
        f"On GPUs of {gpu_gb:g} GB in bfloat16, rank {rank}, {plan['setup']['tokens']} tokens at once on each: GiB of a process; "
        "✓ fits, 8 with the paged 8-bit AdamW that is taken then, c with gradient checkpointing, 8c with both, × does not"
    )
    table = Table(
        "method",
        "sharing",
        *(f"{count} GPU{'s' * (count > 1)}" for count in counts),
        title=title,
        title_justify="left",
    )
    for (method, sharding), by_count in ways.items():
        table.add_row(
            method,
            sharding,
            *(_verdict(by_count[count], gpu_gb, plan["comfortable_share"]) for count in counts),
        )
    return table


def _verdict(way: dict[str, Any], gpu_gb: float, comfortable: float) -> str:
    """Say whether a way fits, and with what."""
    for level in LEVELS:
        used, mark = memory_of(way, level, gpu_gb, comfortable)
        if used <= gpu_gb * GIB:
            return f"{mark or '✓'} {used / GIB:.1f}"
    return f"× {used / GIB:.1f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
