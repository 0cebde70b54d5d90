"""Adapters that PEFT saved for a tiny Llama, and a way to damage their files."""

from collections.abc import Callable
from pathlib import Path

import pytest
from peft_adapters import Edit, edit_adapter, save_peft_adapter


@pytest.fixture(scope="session")
def plain(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 4 and scale 2; only read."""
    return save_peft_adapter(llama_folder, tmp_path_factory.mktemp("peft") / "plain")


@pytest.fixture(scope="session")
def dora(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DoRA; only read."""
    return save_peft_adapter(llama_folder, tmp_path_factory.mktemp("peft") / "dora", use_dora=True)


@pytest.fixture
def edited(plain: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """Return a function that copies the plain adapter and changes its tensors and settings."""
    return lambda change: edit_adapter(plain, tmp_path / "edited", change)
