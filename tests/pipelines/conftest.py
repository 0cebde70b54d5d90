"""Shared fixtures of the pipeline's tests: a tiny model, training rows, and an offline hub."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import hypothesis
import pytest
import torch
from tiny import save_pairs, save_tiny_model, tiny_recipe

from pipelines.config.data_section import DataSection

Values = dict[str, Any]
# The first call may load a library, so set no deadline.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Block the hub in this process and its children; do not use the user's data set cache."""
    cache = tmp_path_factory.mktemp("datasets_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        # The libraries read these variables once, when they are imported.
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, so that parallel tests do not compete for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved two-layer model whose tokenizer has a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "plain", template=False)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty prompts with completions."""
    return save_pairs(tmp_path_factory.mktemp("rows") / "pairs.jsonl")


@pytest.fixture
def recipe_with() -> Callable[..., Values]:
    """Return a function that makes a tiny recipe's plain values.

    A keyword is merged into its section, or replaces it.
    """

    def make(**changes: Any) -> Values:
        values = tiny_recipe(Path("models/tiny"), Path("pairs.jsonl"))
        merged = {
            name: {**values.get(name, {}), **change} if isinstance(change, dict) else change
            for name, change in changes.items()
        }
        return {**values, **merged}

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows as JSON lines."""

    def write(rows: list[Values], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def data_settings() -> Callable[..., DataSection]:
    """Return a function that makes a recipe's data section."""

    def make(source: Path | str, **changes: Any) -> DataSection:
        defaults: dict[str, Any] = {"validation_examples": 8, "max_tokens": 64}
        if source == "docstrings":
            defaults["max_source_characters"] = 500
        return DataSection.model_validate({"source": str(source), **defaults, **changes})

    return make
