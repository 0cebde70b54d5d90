"""In a batch of stages each has its own result or error, and finished ones are skipped."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synthetic_stages import SYNTHETIC, SyntheticInputs, SyntheticResult

from pipelines.errors import PeerError, recorded_error
from pipelines.runtime.child import errors_recorded
from pipelines.runtime.interfaces.inputs import StagePaths
from pipelines.runtime.stage import Stage

WORK = """
from synthetic_stages import SYNTHETIC, SyntheticResult
from pipelines.errors import DataError
from pipelines.runtime.child import execute_stages

def work(folder, inputs, paths):
    with paths.required("data").open("a") as log:
        log.write(inputs.does + " ")
    if inputs.does == "refuses":
        raise DataError("the data has no rows; give some")
    if inputs.does == "fails":
        return SyntheticResult(loss=1 / 0), []
    if inputs.does == "stops":
        import os
        os.kill(os.getpid(), 9)
    (folder / "items.jsonl").write_text("{}")
    return SyntheticResult(loss=1), ["items.jsonl"]

execute_stages(SYNTHETIC, work)
"""
TESTS = Path(__file__).resolve().parents[2]
SyntheticStage = Stage[SyntheticInputs, SyntheticResult]


@pytest.fixture
def stages(tmp_path: Path) -> dict[str, SyntheticStage]:
    """Return stages by what they do; `begin` was called on each."""
    stages = {}
    paths = StagePaths(data=str(tmp_path / "log"))
    for does in ("works", "refuses", "fails", "stops", "works too"):
        label = does.replace(" ", "-")
        inputs = SyntheticInputs(does=does)
        stages[does] = Stage(SYNTHETIC, label, inputs, tmp_path, paths)
        stages[does].begin()
    return stages


def run(stages: dict[str, SyntheticStage], *names: str) -> Any:
    argv = [sys.executable, "-c", WORK, *(str(stages[name].folder) for name in names)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=120, check=False, env=environment
    )


def log(stages: dict[str, SyntheticStage]) -> list[str]:
    return stages["works"].paths.required("data").read_text().split()


def test_every_stage_has_its_result(stages: dict[str, SyntheticStage]) -> None:
    ended = run(stages, "works", "works too")
    assert ended.returncode == 0, ended.stderr
    for name in ("works", "works too"):
        result = stages[name].result()
        assert result is not None
        assert result.loss == 1
        assert result.seconds is not None


def test_a_finished_stage_is_skipped(stages: dict[str, SyntheticStage]) -> None:
    run(stages, "works")
    assert run(stages, "works", "works too", "works").returncode == 0
    assert log(stages) == ["works", "works", "too"]


def test_the_batch_continues_after_a_user_error(stages: dict[str, SyntheticStage]) -> None:
    ended = run(stages, "refuses", "works")
    assert (ended.returncode, ended.stderr) == (2, "error: the data has no rows; give some\n")
    assert str(recorded_error(stages["refuses"].folder)) == "the data has no rows; give some"
    assert stages["works"].result() is not None
    assert stages["refuses"].result() is None


def test_a_bug_is_recorded_in_its_stage_and_ends_the_batch(
    stages: dict[str, SyntheticStage],
) -> None:
    ended = run(stages, "works", "fails", "works too")
    assert ended.returncode == 1
    assert "ZeroDivisionError" in str(recorded_error(stages["fails"].folder))
    assert "Traceback" in ended.stderr
    assert stages["works"].result() is not None
    assert stages["works too"].result() is None


def test_an_interrupted_batch_loses_only_the_running_stage(
    stages: dict[str, SyntheticStage],
) -> None:
    assert run(stages, "works", "stops", "works too").returncode == -9
    assert stages["works"].result() is not None
    assert run(stages, "works", "works too").returncode == 0
    assert log(stages) == ["works", "stops", "works", "too"]


def test_a_failing_rank_records_its_error(
    stages: dict[str, SyntheticStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of another rank, which only lost its peer, does not replace it."""
    folder = stages["fails"].begin()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TypeError), errors_recorded(folder):
        raise TypeError("'PackMask' object is not subscriptable\nand more")
    with pytest.raises(SystemExit), errors_recorded(folder):
        raise PeerError("rank 0 lost rank 1")
    error = recorded_error(folder)
    assert error is not None
    assert str(error).startswith(
        f"{folder} failed on rank 1 with TypeError: 'PackMask' object is not subscriptable; its log"
    )
