"""A batch of stages: each has its own result or its own error, what is done is passed over, and a bug ends the batch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import PeerError, recorded_error
from pipelines.runtime.child import errors_recorded
from pipelines.runtime.stage import Stage

WORK = """
from pathlib import Path
from pipelines.child import run_stages
from pipelines.errors import DataError

def work(folder, inputs, paths):
    with Path(paths["log"]).open("a") as log:
        log.write(inputs["does"] + " ")
    if inputs["does"] == "refuses":
        raise DataError("the data has no rows; give some")
    if inputs["does"] == "fails":
        return {"value": 1 / 0}, []
    if inputs["does"] == "stops":
        import os
        os.kill(os.getpid(), 9)
    (folder / "items.jsonl").write_text("{}")
    return {"value": 1}, ["items.jsonl"]

run_stages(work)
"""


@pytest.fixture
def stages(tmp_path: Path) -> dict[str, Stage]:
    """Begun stages by what they do."""
    found = {}
    for does in ("works", "refuses", "fails", "stops", "works too"):
        found[does] = Stage(
            "evaluate",
            does.replace(" ", "-"),
            {"does": does},
            tmp_path,
            {"log": str(tmp_path / "log")},
        )
        found[does].begin()
    return found


def run(stages: dict[str, Stage], *names: str) -> Any:
    argv = [sys.executable, "-c", WORK, *(str(stages[name].folder) for name in names)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


def log(stages: dict[str, Stage]) -> list[str]:
    return Path(stages["works"].paths["log"]).read_text().split()


def test_every_stage_has_its_result(stages: dict[str, Stage]) -> None:
    ended = run(stages, "works", "works too")
    assert ended.returncode == 0, ended.stderr
    for name in ("works", "works too"):
        result = stages[name].result()
        assert result is not None and result["value"] == 1 and result["seconds"] >= 0


def test_what_is_done_is_passed_over(stages: dict[str, Stage]) -> None:
    run(stages, "works")
    assert run(stages, "works", "works too", "works").returncode == 0
    assert log(stages) == ["works", "works", "too"]


def test_a_refused_stage_leaves_the_others_to_be_done(stages: dict[str, Stage]) -> None:
    ended = run(stages, "refuses", "works")
    assert (ended.returncode, ended.stderr) == (2, "error: the data has no rows; give some\n")
    assert str(recorded_error(stages["refuses"].folder)) == "the data has no rows; give some"
    assert stages["works"].result() is not None
    assert stages["refuses"].result() is None


def test_a_bug_is_left_in_its_stage_and_ends_the_batch(stages: dict[str, Stage]) -> None:
    ended = run(stages, "works", "fails", "works too")
    assert ended.returncode == 1
    assert (
        "ZeroDivisionError" in str(recorded_error(stages["fails"].folder))
        and "Traceback" in ended.stderr
    )
    assert stages["works"].result() is not None
    assert stages["works too"].result() is None


def test_an_interrupted_batch_loses_the_stage_at_work(stages: dict[str, Stage]) -> None:
    assert run(stages, "works", "stops", "works too").returncode == -9
    assert stages["works"].result() is not None
    assert run(stages, "works", "works too").returncode == 0
    assert log(stages) == ["works", "stops", "works", "too"]


def test_a_rank_that_fails_leaves_its_own_error(
    stages: dict[str, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no launcher's: that of another rank, which only lost its peer, does not take its place."""
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
