"""A build that was killed does not block later runs; one that is running is left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runtime import launcher, warm_up


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


def test_each_python_environment_has_a_folder_unless_one_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(launcher.EXTENSIONS, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = launcher.extensions_folder()
    assert own.parent == tmp_path / "torch_extensions"
    assert launcher._environment(1)[launcher.EXTENSIONS] == str(own)
    monkeypatch.setattr(sys, "prefix", "/opt/other")
    assert launcher.extensions_folder() != own
    monkeypatch.setenv(launcher.EXTENSIONS, str(tmp_path / "chosen"))
    assert launcher.extensions_folder() == tmp_path / "chosen"
