"""The long measurements run in their quick mode, with their checks enabled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("module", ["parity", "distributed", "faults", "dataset_checks", "team"])
def test_a_measurement_meets_its_goals(tmp_path: Path, module: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", module, "--quick"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "LORA_RUNS": str(tmp_path / "runs"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
