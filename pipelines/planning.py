"""`lora plan`: prepare what the plan needs, and print what would be trained and what it would cost."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines import launch
from pipelines.recipe import Recipe
from pipelines.stages import Stages

console = Console()


def print_plan(recipe: Recipe, root: Path) -> None:
    """Prepare base and data, which are kept for the run, and print the plan."""
    stages = Stages(recipe, root)
    base = launch.result_of(stages.base(), "pipelines.base_model", threads=1)
    data = launch.result_of(stages.data(base), "pipelines.data", threads=1)
    plan = launch.result_of(stages.plan(base, data), "pipelines.plan", threads=1)
    console.print(_targets_table(plan["targets"]))
    console.print(_runs_table(recipe, plan["runs"], base["weights"]))


def _targets_table(targets: list[dict[str, Any]]) -> Table:
    table = Table("module", "layers", "shape (out × in)", title="Modules that get an adapter", title_justify="left")
    for target in targets:
        table.add_row(target["name"], str(target["count"]), f"{target['out_features']} × {target['in_features']}")
    return table


def _runs_table(recipe: Recipe, runs: dict[str, Any], base_weights: int) -> Table:
    title = f"{recipe.name}: {recipe.training.steps} steps of {recipe.training.batch_size} examples on {recipe.launch.processes} processes"
    table = Table(
        "run", "scale", "trained weights", "share", "file", "memory a process", "of it activations", title=title, title_justify="left"
    )
    for label, run in runs.items():
        table.add_row(
            label,
            f"{run['scale']:g}" if "scale" in run else "",
            f"{run['trained_weights']:,}",
            f"{run['trained_weights'] / base_weights:.2%}",
            _megabytes(run["file_bytes"]),
            _megabytes(run["memory_bytes"]),
            _megabytes(run["activation_bytes"]),
        )
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
