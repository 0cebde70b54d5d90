"""The content of summary.json: what was compared, on which base and data, by which code."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config.experiments import EvaluatedModel, Experiment
from pipelines.runtime.interfaces.results import BaseResult, DataResult
from pipelines.runtime.stage import digest, library_versions
from pipelines.workflow.champion import Champion
from pipelines.workflow.run import PipelineRun, TrainedExperiment
from pipelines.workflow.stages import EvaluateStage
from pipelines.workflow.training import TrainedControl

if TYPE_CHECKING:
    from pipelines.comparison.comparison import ComparedModel, FrontierVariant
    from pipelines.comparison.document import Comparison, ForwardChecks, Summary
    from pipelines.comparison.grid import GridSearch

DISTRIBUTIONS = "distributions.safetensors"


@dataclass(frozen=True)
class RunResults:
    """What a run has produced before the comparison."""

    base: BaseResult
    """What the base's stage reported."""
    data: DataResult
    """What the data's stage reported."""
    data_warnings: tuple[str, ...]
    """What may be unintended about the data."""
    control: TrainedControl
    adapters: Sequence[TrainedExperiment]
    champion: Champion | None
    """The registered champion, if there is one."""
    evaluated: Mapping[EvaluatedModel, EvaluateStage]
    """Every scored model, with its evaluation stage."""
    grid: "GridSearch | None" = None
    """How the adapters were found; None for a recipe without a grid."""

    @property
    def trained(self) -> list[TrainedExperiment]:
        """The control, if there is one, and the adapters."""
        return [*self.control.chosen, *self.adapters]


def summarize(run: PipelineRun, results: RunResults) -> "Summary":
    """Compare all models and return the summary."""
    from pipelines.comparison.document import Summary

    recipe = run.recipe.model_dump(mode="json")
    stage_keys = sorted(stage.key for stage in results.evaluated.values())
    item_files = {
        model.label: str(stage.folder / "items.jsonl") for model, stage in results.evaluated.items()
    }
    return Summary(
        **dict(_compare(run, results, item_files)),
        name=run.recipe.name,
        key=digest([recipe, stage_keys]),
        seed=run.recipe.seed,
        recipe=run.recipe,
        commit=_commit(),
        versions=library_versions(),
        machine=_machine(results.trained),
        base=results.base,
        data=results.data,
        data_warnings=results.data_warnings,
        items=item_files,
        forward=_forward_checks(results),
        grid=results.grid,
    )


def _compare(run: PipelineRun, results: RunResults, item_files: Mapping[str, str]) -> "Comparison":
    """Compare the trained models with the base, the control and the champion."""
    from pipelines.comparison import comparison
    from pipelines.comparison.record_files import read_items

    distributions = {}
    variants = []
    for model, stage in results.evaluated.items():
        path = stage.folder / DISTRIBUTIONS
        if path.is_file():
            distributions[model.label] = path
        if model.experiment is not None and not model.is_complete:
            variants.append(_frontier_variant(model, model.experiment))
    champion = None
    if results.champion is not None:
        champion = comparison.ComparedChampion(
            results.champion.version, results.champion.adapter_sha256, results.champion.objection
        )
    return comparison.compare(
        run.recipe,
        [_compared_model(trained) for trained in results.trained],
        {label: read_items(Path(file)) for label, file in item_files.items()},
        comparison.ComparisonContext(
            distributions, results.control.tuning_losses, champion, variants
        ),
    )


def _compared_model(trained: TrainedExperiment) -> "ComparedModel":
    """Return a trained model for the comparison."""
    from pipelines.comparison.comparison import ComparedModel
    from pipelines.comparison.grid import AdapterSettings

    experiment = trained.experiment
    folder = str(trained.stage.folder)
    inputs = trained.stage.inputs
    adapter = None
    if inputs.adapter is not None:
        adapter = AdapterSettings(
            rank=inputs.adapter.rank,
            learning_rate=inputs.learning_rate,
            target_modules=inputs.adapter.lora.target_modules,
        )
    return ComparedModel(
        experiment.label, experiment.rank, trained.stage.key, folder, trained.result, adapter
    )


def _frontier_variant(model: EvaluatedModel, experiment: Experiment) -> "FrontierVariant":
    """Return a model that only the frontier shows as the comparison takes it."""
    from pipelines.comparison.comparison import FrontierVariant

    assert model.saved_step is not None, "a model of the frontier was trained"
    rank, cut_from = experiment.rank, None
    if model.truncated_rank is not None:
        rank, cut_from = model.truncated_rank, experiment.rank
    return FrontierVariant(
        label=model.label,
        method=experiment.method,
        rank=rank,
        step=model.saved_step,
        learning_rate=experiment.learning_rate,
        cut_from=cut_from,
    )


def _forward_checks(results: RunResults) -> "dict[str, ForwardChecks]":
    """Return how training and scoring agree with each model's own forward."""
    from pipelines.comparison.document import ForwardChecks

    training = {}
    for trained in results.trained:
        training[trained.experiment.label] = trained.result.facts.forward
    checks = {}
    for model, stage in results.evaluated.items():
        evaluated = stage.result()
        checks[model.label] = ForwardChecks(
            training=training.get(model.label),
            scoring=None if evaluated is None else evaluated.forward,
            served=None if evaluated is None else evaluated.served,
        )
    return checks


def _machine(trained: Sequence[TrainedExperiment]) -> str:
    """Return the hardware of the run, its GPUs if it used any, and the dtype of the trainings."""
    processors = dict.fromkeys(one.result.facts.processor for one in trained)
    gpus = [name for name in processors if name != "CPU"]
    dtypes = dict.fromkeys(one.result.facts.dtype for one in trained)
    host = [f"{os.cpu_count()} cores", platform.machine(), platform.system()]
    return ", ".join([*gpus, *host, f"trained in {' and '.join(dtypes)}"])


def _commit() -> str:
    """Return the commit of the code, marked if files differ from it."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
