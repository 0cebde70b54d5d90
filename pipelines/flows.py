"""The workflow, from a recipe to a compared, checked and registered adapter. Start reading here.

data ─► base ─► train each rank and the control ─► evaluate all ─► compare ─► report ─► register ─► alias
"""

import json
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from lora_core.files import write_text
from pipelines import launch, tasks
from pipelines.errors import RegistryError
from pipelines.places import runs_root
from pipelines.progress import say, show
from pipelines.recipe import Recipe, load_recipe
from pipelines.stage import Stage, digest, library_versions, read_records
from pipelines.stages import Stages


@flow(name="finetune", description=__doc__)
def finetune(recipe: str, ranks: list[int] = []) -> str:  # noqa: B006 - Prefect's form wants a plain list
    """Run a recipe from data to registered adapter; return the path of its summary.json.

    Args:
        recipe: a YAML file, or the name of one in pipelines/recipes.
        ranks: replaces the recipe's ranks where not empty.
    """
    settings = load_recipe(recipe, ranks=ranks)
    run = Run(settings, Stages(settings, runs_root()))
    base = run.step(tasks.prepare_base, run.stages.base())
    data_stage = run.stages.data(base)
    data = (data_stage, run.step(tasks.prepare_data, data_stage))
    run.step(tasks.plan, run.stages.plan(base, data))
    trained = train_all(run, base, data)
    evaluated = evaluate_all(run, base, data, trained)
    summary = summarise(run, base, data[1], trained, evaluated)
    return str(publish(run, summary))


@dataclass
class Run:
    """One execution of a recipe: its stages, and how long each took."""

    recipe: Recipe
    stages: Stages
    started: float = field(default_factory=time.monotonic)
    timings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the run's summary and report go."""
        return self.stages.root / self.recipe.name

    def step(self, task: Any, stage: Stage, *arguments: Any) -> dict[str, Any]:
        """Run or reuse a stage, say so, and note the time."""
        name, begun = f"{stage.kind} {stage.label}", time.monotonic()
        figures, reused = tasks.run_or_reuse(task, stage, *arguments)
        seconds = self.note(name, begun, cached=reused, folder=str(stage.folder))
        say(f"[green]✓[/green] {name} [dim]{'found again' if reused else f'{seconds:.0f} s'}[/dim]")
        return figures

    def note(self, name: str, begun: float, *, cached: bool = False, folder: str = "") -> float:
        """Keep how long a stage took since the clock stood at `begun`; return the seconds."""
        seconds = round(time.monotonic() - begun, 2)
        self.timings.append({"name": name, "seconds": seconds, "cached": cached, "folder": folder})
        return seconds

    def times(self) -> dict[str, Any]:
        """Return the stages so far and the time of the whole run, as the summary holds them."""
        return {"stages": self.timings, "seconds": round(time.monotonic() - self.started, 2)}


def train_all(run: Run, base: dict[str, Any], data: tuple[Stage, dict[str, Any]]) -> dict[str, tuple[Stage, dict[str, Any]]]:
    """Train the control and each rank, one after the other: each takes all processes."""
    done = {}
    for rank in (None, *run.recipe.lora.ranks):
        stage = run.stages.train(base, data, rank)
        done[stage.label] = (stage, run.step(tasks.train, stage, run.recipe.launch))
    return done


def evaluate_all(
    run: Run, base: dict[str, Any], data: tuple[Stage, dict[str, Any]], trained: dict[str, tuple[Stage, dict[str, Any]]]
) -> dict[str, Stage]:
    """Score the base, the base in 4 bits and all that was trained, a few side by side."""
    bases = ["base"] if run.recipe.base_model.quantization == "none" else ["base", "base-nf4"]
    stages = {label: run.stages.evaluate(label, base, data, None) for label in bases}
    stages |= {label: run.stages.evaluate(label, base, data, stage) for label, (stage, _) in trained.items()}
    at_once = run.recipe.launch.evaluations_at_once
    with ThreadPoolExecutor(at_once) as pool:
        waiting = [pool.submit(copy_context().run, run.step, tasks.evaluate, stage, at_once) for stage in stages.values()]
        try:
            for one in waiting:
                one.result()
        except BaseException:  # Ctrl-C, a cancellation, or one that failed: the others need not end first
            pool.shutdown(wait=False, cancel_futures=True)
            launch.end_all()
            raise
    return stages


def summarise(
    run: Run, base: dict[str, Any], data: dict[str, Any], trained: dict[str, tuple[Stage, dict[str, Any]]], evaluated: dict[str, Stage]
) -> dict[str, Any]:
    """Compare everything with everything and return the summary."""
    from pipelines.judging.comparison import Trained, compare

    ranks = dict(zip((f"rank-{rank}" for rank in run.recipe.lora.ranks), run.recipe.lora.ranks, strict=True))
    models = [Trained(label, ranks.get(label), stage.key, str(stage.folder), figures) for label, (stage, figures) in trained.items()]
    paths = {label: str(stage.folder / "items.jsonl") for label, stage in evaluated.items()}
    items = {label: read_records(Path(path)) for label, path in paths.items()}
    return {
        "name": run.recipe.name,
        "key": digest([run.recipe.model_dump(mode="json"), sorted(stage.key for stage in evaluated.values())]),
        "seed": run.recipe.seed,
        "recipe": run.recipe.model_dump(mode="json"),
        "commit": _commit(),
        "versions": library_versions(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "base": base,
        "data": data,
        "items": paths,
        **compare(run.recipe, models, items),
    }


def publish(run: Run, summary: dict[str, Any]) -> Path:
    """Write the report, register the adapters, show the table; a registry that fails loses nothing but itself."""
    from pipelines.reporting.report import markdown_table, terminal_table, write_html

    path, page = run.folder / "summary.json", run.folder / "report.html"
    summary |= run.times()
    write_summary(path, summary)
    write_html(summary, page)
    note = markdown_table(summary)
    failure = register(run, summary, [path, page], note)
    summary |= run.times()
    write_summary(path, summary)
    create_markdown_artifact(note, key="comparison", description=summary["decision"])
    say("")
    show(terminal_table(summary))
    say(f"report   {page}\nsummary  {path}")
    if failure is not None:
        raise failure
    return path


def register(run: Run, summary: dict[str, Any], files: list[Path], note: str) -> RegistryError | None:
    """Register the adapters and put into the summary what they are registered as; return what the registry refused."""
    begun = time.monotonic()
    try:
        from pipelines.reporting import registry

        summary["registered"] = registry.register(summary, run.stages.root, files, note)
    except RegistryError as error:
        return error
    finally:
        run.note("register", begun)
    return None


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write the summary with its models in the order of the report."""
    write_text(path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _commit() -> str:
    """Return the commit of the code, with a mark where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
