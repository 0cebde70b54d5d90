"""What the last completed run of a recipe read, so that an idle check ends in seconds.

`runs/NAME/completed/` has one file per choice of ranks, because a nightly run of one rank and a
weekly run of all ranks are due independently. Imports no torch.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from lora_core.files import write_text
from pipelines.config.recipe import Recipe
from pipelines.paths import evaluation_files
from pipelines.runtime.interfaces.values import Values
from pipelines.runtime.stage import digest
from pipelines.workflow.named_sources import NamedSources
from pipelines.workflow.run import PipelineRun
from pipelines.workflow.stages import content_digest


class CompletedRun(Values):
    """A run that ended with a report and a registration."""

    inputs: str
    """Digest of its recipe, and of the content of its data and evaluation files."""
    flow_run: str
    """Name of the flow run."""
    finished: str
    """Date and time."""


def inputs_digest(recipe: Recipe, *, sources: Mapping[str, str], files: Mapping[str, str]) -> str:
    """Return a digest of what a run has read: its recipe, its data and its evaluation files.

    Args:
        recipe: as it was loaded.
        sources: name → identity of the data's files.
        files: name → digest of the evaluation's files.
    """
    return digest([recipe.model_dump(mode="json"), dict(sources), dict(files)])


def current_inputs_digest(run: PipelineRun) -> str:
    """Return the digest of what a run would read now.

    Raises:
        DataError: a remote data source cannot be read.
    """
    folders = run.stages.search_folders
    sources = NamedSources.of(run.recipe.data, folders).identities
    files = {}
    for name, path in evaluation_files(run.recipe.evaluation, folders).items():
        files[name] = content_digest(path)
    return inputs_digest(run.recipe, sources=sources, files=files)


def completed_run(run: PipelineRun) -> CompletedRun | None:
    """Return the last completed run of the recipe with these ranks; None if there is none."""
    try:
        return CompletedRun.model_validate_json(_path(run).read_text())
    except (FileNotFoundError, ValidationError):
        return None


def record_completed(run: PipelineRun, inputs: str, flow_run: str) -> None:
    """Record that a run has completed.

    Args:
        run: the run.
        inputs: its `inputs_digest`.
        flow_run: name of the flow run.
    """
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    record = CompletedRun(inputs=inputs, flow_run=flow_run, finished=finished)
    write_text(_path(run), record.model_dump_json(indent=2) + "\n")


def _path(run: PipelineRun) -> Path:
    ranks = "-".join(map(str, run.recipe.lora.ranks))
    return run.folder / "completed" / f"ranks-{ranks}.json"
