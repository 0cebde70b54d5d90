"""A base is found on this host without a download, and only if its weights are here."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipelines.errors import BaseModelError
from pipelines.tracking.pull_lock import LockedBase
from pipelines.workflow.adapter_base import named_base
from pipelines.workflow.local_base import find_local_base

HUB_BASE = LockedBase(id="owner/name", revision="", quantization="", fingerprints={})
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty snapshot of owner/name in an empty cache."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    model = cache / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    folder = model / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def test_cached_hub_model_is_found(snapshot: Path, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, snapshot, dirs_exist_ok=True)
    assert find_local_base(HUB_BASE, tmp_path / "runs") == snapshot


def test_cached_config_alone_is_not_a_base(
    snapshot: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copyfile(tiny_folder / "config.json", snapshot / "config.json")
    assert find_local_base(HUB_BASE, tmp_path / "runs") is None


def test_named_base_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="'nothing' is neither a folder"):
        named_base("nothing", tmp_path / "runs")
