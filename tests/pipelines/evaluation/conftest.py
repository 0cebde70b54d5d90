"""Fixtures: the tiny model with weights so large that attention affects every score."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lm_eval_tasks import TASKS, settings, write_docs, write_task
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pipelines.comparison.record_types import ItemRecord
from pipelines.evaluation.harness import load_tasks
from pipelines.models.checked import CheckedReader
from pipelines.models.hardware import Hardware
from pipelines.models.loading import load_model
from pipelines.models.tokenizer import load_tokenizer

SHARPER = 4.0
"""Factor of the weights: a random model hardly uses its context, so a wrong mask would not show."""
CPU = Hardware("cpu", torch.float32, "gloo")


@pytest.fixture(scope="session")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(SHARPER)
    sharper = tmp_path_factory.mktemp("models") / "sharper"
    model.save_pretrained(sharper)
    load_tokenizer(tiny_folder).save_pretrained(sharper)
    return sharper


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def model(folder: Path) -> PreTrainedModel:
    """The model as the pipeline loads it."""
    return load_model(folder, "none", CPU)


@pytest.fixture(scope="session")
def reference(folder: Path) -> PreTrainedModel:
    """The same weights, loaded by transformers with PyTorch's own attention."""
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32
    ).eval()


@pytest.fixture
def tasks_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of lm-eval task files with their documents; the library's warnings are ignored."""
    write_docs(tmp_path / "docs.jsonl")
    for name, task in TASKS.items():
        write_task(tmp_path, name, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path


@pytest.fixture
def records_of(
    tasks_folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[..., list[ItemRecord]]:
    """Return a function from names of lm-eval tasks to our records."""

    def records(
        *names: str, context: int | None = None, limit: int | None = None
    ) -> list[ItemRecord]:
        tasks = load_tasks(settings(*names, limit=limit), 7, [tasks_folder])
        return list(tasks.records(CheckedReader(model), tokenizer, context))

    return records
