"""What the tests of the evaluation share: the tiny model with weights so large that what is attended to moves every score."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pipelines.models.hardware import Hardware
from pipelines.models.loading import load_model
from pipelines.models.tokenizer import load_tokenizer

SHARPER = 4.0
"""The weights' factor: a freshly drawn model hardly looks at its context, and any mask would do."""
CPU = Hardware("cpu", torch.float32, "gloo")


@pytest.fixture(scope="session")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, sharper."""
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
    """The same weights, loaded as anyone would, with PyTorch's own attention."""
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32
    ).eval()
