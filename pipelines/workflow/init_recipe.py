"""`lora init`: write a recipe for new data, after preparing them as a run does."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from lora_core.files import write_text
from pipelines.config.recipe import Recipe, local_path, parse_recipe
from pipelines.config.steps import resolve_steps
from pipelines.data.sources.file_discovery import is_pattern, is_remote
from pipelines.errors import RecipeError
from pipelines.models.base_model import identify
from pipelines.models.tokenizer_facts import TokenizerFacts
from pipelines.paths import runs_root
from pipelines.runtime.interfaces.results import DataResult
from pipelines.runtime.launcher import ensure_result
from pipelines.runtime.sharding import check_launch
from pipelines.workflow.stages import Stages
from pipelines.workflow.starter_recipe import (
    HostLaunch,
    StarterRecipe,
    fit_epochs,
    fit_lengths,
)

SAMPLE_ROWS = 20_000
"""Rows from which the lengths are measured."""
LONGEST_DRAFT = 8192
"""Maximum length, in tokens, while lengths are measured with a base without a limit."""
MOST_CPU_PROCESSES = 4


@dataclass(frozen=True)
class NewRecipe:
    """What the command line names."""

    data: str
    """A file, a folder, a pattern of files, an address or a hub id."""
    base: str
    name: str | None = None
    output: Path | None = None
    """File of the recipe; NAME.yaml by default."""
    overwrite: bool = False


def write_recipe(new: NewRecipe) -> Path:
    """Prepare the data, write a recipe for them, and return its file.

    Raises:
        PipelineError: the file exists, or the base or the data cannot be used; then nothing is
            written.
    """
    from pipelines.models.base_tokenizer import base_tokenizer

    name = new.name or _name_of(new.data)
    output = new.output or Path(f"{name}.yaml")
    if output.exists() and not new.overwrite:
        raise RecipeError(
            f"{str(output)!r} exists; name another file with --output, or use --force to replace it"
        )
    base = _base_of(new.base)
    with base_tokenizer(identify(base, None)) as tokenizer:
        draft = StarterRecipe(
            name=name,
            base=base,
            source=_source_of(new.data, output.parent),
            launch=_launch_of_this_host(),
            max_tokens=tokenizer.context_tokens or LONGEST_DRAFT,
        )
        text = _fitted(draft, tokenizer, output.parent)
    write_text(output, text)
    return output


def _fitted(draft: StarterRecipe, tokenizer: TokenizerFacts, folder: Path) -> str:
    """Return the text of a recipe that fits its data."""
    sample = _measure_sample(_parsed(draft), tokenizer, folder)
    fitted = fit_lengths(draft, sample, tokenizer.context_tokens)
    data_stage = Stages(_parsed(fitted), runs_root(), folder).data(tokenizer)
    data = ensure_result(data_stage, threads=1)  # a run of the recipe reuses it
    starter = fit_epochs(fitted, data)
    check_launch(resolve_steps(_parsed(starter), data.train_examples))
    return starter.text()


def _parsed(starter: StarterRecipe) -> Recipe:
    return parse_recipe(yaml.safe_load(starter.text()), source="the new recipe")


def _measure_sample(recipe: Recipe, tokenizer: TokenizerFacts, folder: Path) -> DataResult:
    """Prepare some of the rows in this process."""
    from pipelines.data.preparation import prepare

    settings = recipe.data.model_copy(update={"max_rows": SAMPLE_ROWS})
    sampled = recipe.model_copy(update={"data": settings})
    stage = Stages(sampled, runs_root(), folder).data(tokenizer)
    with TemporaryDirectory() as scratch:
        result, _ = prepare(Path(scratch), stage.inputs, stage.paths)
    return result


def _name_of(data: str) -> str:
    """Return a name for the recipe of a source."""
    path = Path(data)
    if is_pattern(data):
        path = path.parent
    name = path.resolve().name if path.exists() else path.name
    words = re.sub(r"[^A-Za-z0-9]+", "_", name.partition(".")[0]).strip("_")
    return words or "data"


def _base_of(base: str) -> str:
    """Return the base; the absolute path of a local one, since a recipe can be moved."""
    path = local_path(base)
    return str(path.resolve()) if path.exists() else base


def _source_of(data: str, folder: Path) -> str:
    """Return the source as a recipe in a folder names it."""
    is_local = not is_remote(data) and (local_path(data).exists() or is_pattern(data))
    if not is_local:
        return data
    return os.path.relpath(local_path(data), folder)


def _launch_of_this_host() -> HostLaunch:
    """Return how to train here: a process per GPU, or a few on a CPU."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus:
        return HostLaunch("gpu_ddp", gpus, gpus, f"one process for each of {gpus} GPUs")
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        return HostLaunch("cpu_single", 1, 1, "one process on one core")
    processes = min(MOST_CPU_PROCESSES, cores)
    reason = f"{processes} processes on {cores} cores"
    return HostLaunch("cpu_zero2", processes, processes, reason)
