"""A grid of 8 experiments, searched by successive halving, next to training all of them.

    python tests/benchmarks/grid_bench.py [--seeds 3] [--quick --base FOLDER]

It prints, for each seed, the time of the search relative to one training, the winner of the search
and of the exhaustive grid, and how far their losses on the tuning examples are apart.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.config.experiments import grid_experiments
from pipelines.config.recipe import Recipe, parse_recipe
from pipelines.config.sections import LaunchSection
from pipelines.runtime import hosts, launcher
from pipelines.runtime.interfaces.results import BaseResult
from pipelines.workflow.grid_search import train_adapters
from pipelines.workflow.run import PipelineRun
from pipelines.workflow.stages import PreparedData, Stages
from pipelines.workflow.training import train_one, tune_all
from pipelines.workflow.training_dtype import resolve_dtype

SMOLLM2 = "embedded:SmolLM2-135M-Instruct"
MAX_RATIO = 2.5
"""Goal for the steps of the search, and for its time, in trainings."""
LARGEST_DIFFERENCE = 0.02
"""Nats per token by which the winner of a search may be worse than that of the exhaustive grid."""


class DirectRun(PipelineRun):
    """Runs trainings and tuning without Prefect and MLflow, whose time is not measured here."""

    def run_stage(self, task: Any, stage: Any, settings: LaunchSection, _: Any = None) -> Any:
        return stage.result() or hosts.train(stage, settings, watch=None, report=print)

    def run_stages(self, task: Any, stages: Sequence[Any], *arguments: Any) -> None:
        missing = [stage for stage in stages if stage.result() is None]
        for stage in missing:
            stage.begin()
        if missing:
            argv = launcher.stage_argv(missing)
            launcher.run_child(missing, argv, threads=launcher.threads_each(1))


@dataclass(frozen=True)
class Prepared:
    """A recipe with its base and data, ready to train."""

    recipe: Recipe
    base: BaseResult
    data: PreparedData

    def run(self, root: Path) -> PipelineRun:
        """Return a run whose stages are in another folder."""
        return DirectRun(self.recipe, Stages(self.recipe, root))


@dataclass(frozen=True)
class Outcome:
    """A search next to the exhaustive grid."""

    seed: int
    searched: str
    """Label of the winner of the search."""
    exhaustive: str
    difference: float
    """Loss of the searched winner minus that of the exhaustive one, nats per token."""
    steps: float
    """Of the search, in trainings."""
    time: float
    memory: float
    """Largest peak of a process of the search, relative to that of one training."""

    @property
    def is_good(self) -> bool:
        """Whether the search finds a winner that is as good."""
        return self.difference <= LARGEST_DIFFERENCE and self.steps <= MAX_RATIO

    def __str__(self) -> str:
        same = "the same winner" if self.searched == self.exhaustive else self.exhaustive
        return (
            f"seed {self.seed}: search {self.steps:.2f} × the steps, {self.time:.2f} × the time, "
            f"{self.memory:.2f} × the memory of one training; winner {self.searched}; exhaustive: "
            f"{same}, {self.difference:+.4f} nats per token"
        )


def grid_recipe(seed: int, base: str, batch_size: int, *, quick: bool) -> Recipe:
    """Return a recipe with a grid of 8 experiments, or of 2 short ones."""
    grid = {"ranks": [4, 16], "learning_rates": [5e-4, 1e-3, 2e-3, 4e-3]}
    training = {"steps": 32, "batch_size": batch_size, "warmup_steps": 2}
    if quick:
        grid = {"ranks": [2], "learning_rates": [1e-3, 1e-2]}
        training = {"steps": 8, "batch_size": 4, "warmup_steps": 1}
    values = {
        "name": "grid",
        "seed": seed,
        "base_model": {"id": base},
        "data": {
            "source": "docstrings",
            "max_source_characters": 500,
            "validation_examples": 48,
            "max_tokens": 320,
        },
        "lora": {"alpha": 32},
        "experiments": grid,
        "training": training,
        "launch": {"config": "cpu_single"},
        "registry": {"model": "grid"},
    }
    return parse_recipe(values)


def prepare(recipe: Recipe, root: Path) -> Prepared:
    """Prepare base and data of a recipe."""
    stages = Stages(recipe, root)
    threads = launcher.threads_each(1)
    base = launcher.ensure_result(stages.base(), threads=threads)
    data_stage = stages.data(base)
    data = PreparedData(data_stage, launcher.ensure_result(data_stage, threads=threads))
    recipe = resolve_dtype(
        recipe, stages, lambda stage: launcher.ensure_result(stage, threads=threads)
    )
    return Prepared(recipe, base, data)


def compare(seed: int, options: argparse.Namespace, folder: Path) -> Outcome:
    """Search a grid, train all of it as well, and compare."""
    recipe = grid_recipe(seed, options.base, options.batch_size, quick=options.quick)
    prepared = prepare(recipe, folder / "prepared")
    base, data = prepared.base, prepared.data
    alone = prepared.run(folder / "alone")
    experiments = grid_experiments(prepared.recipe)
    train_one(alone, base, data, experiments[0])  # starts the processes that stages share
    trained = {}
    seconds = {}
    for experiment in experiments[1:] + experiments[:1]:
        started = time.perf_counter()
        trained[experiment.label] = train_one(alone, base, data, experiment)
        seconds[experiment.label] = time.perf_counter() - started
    tuned = tune_all(alone, base, data, [one.stage for one in trained.values()])
    losses = {}
    for label, result in zip(trained, tuned, strict=True):
        losses[label] = result.tuning_loss
    best = min(losses, key=lambda label: losses[label])

    started = time.perf_counter()
    found = train_adapters(prepared.run(folder / "searched"), base, data)
    search_seconds = time.perf_counter() - started
    (winner,) = found.adapters
    assert found.grid is not None, "the recipe has a grid"
    label = winner.experiment.label
    if winner.result.saved.adapter_sha256 != trained[label].result.saved.adapter_sha256:
        raise SystemExit(f"{label} differs from the same adapter trained alone")
    memory = trained[label].result.peak_memory_bytes
    times = sorted(seconds[one.label] for one in experiments[1:])
    return Outcome(
        seed=seed,
        searched=label,
        exhaustive=best,
        difference=losses[label] - losses[best],
        steps=found.grid.steps_taken / found.grid.steps,
        time=search_seconds / times[len(times) // 2],
        memory=winner.result.peak_memory_bytes / memory,
    )


def main() -> None:
    """Compare with several seeds; exit with 1 if a search misses a goal; a short grid may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed of a short grid")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per step")
    parser.add_argument("--base", default=SMOLLM2, help="id or folder of a base model")
    options = parser.parse_args()
    outcomes = []
    for seed in range(1 if options.quick else options.seeds):
        with TemporaryDirectory() as folder:
            outcomes.append(compare(seed, options, Path(folder)))
        print(outcomes[-1], flush=True)
    same = sum(one.searched == one.exhaustive for one in outcomes)
    good = sum(one.is_good for one in outcomes)
    print(
        f"{same} of {len(outcomes)} searches find the winner of the exhaustive grid, {good} one "
        f"within {LARGEST_DIFFERENCE} nats per token"
    )
    sys.exit(0 if options.quick or good == len(outcomes) else 1)


if __name__ == "__main__":
    main()
