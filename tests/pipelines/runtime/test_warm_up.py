"""A build that was killed does not block later runs; one that is running is left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runtime import warm_up


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a compiled operator that is marked as being built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / warm_up.OPERATOR
    folder.mkdir()
    (folder / f"{warm_up.OPERATOR}.so").touch()
    (folder / warm_up.BUILD_LOCK).touch()
    return folder


def test_the_mark_of_a_killed_build_is_removed(built: Path) -> None:
    warm_up.ensure_compiled()
    assert not (built / warm_up.BUILD_LOCK).exists()


def test_the_mark_of_a_running_build_is_kept(built: Path) -> None:
    argv = [sys.executable, "-c", "input()"]
    with subprocess.Popen(argv, cwd=built, stdin=subprocess.PIPE) as compiler:
        assert warm_up._is_being_built(built)
        compiler.communicate()
    assert not warm_up._is_being_built(built)
