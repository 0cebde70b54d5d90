"""The benchmarks run in their quick mode, with their checks of equality enabled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny_model

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs, which both benchmarks share."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def base(runs: Path) -> Path:
    """Return a tiny model whose context has room for every item of the benchmarks."""
    folder = save_tiny_model(runs / "base-model")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return folder


def test_a_search_finds_the_adapter_that_is_trained_alone(base: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(HERE / "grid_bench.py"), "--quick", "--base", str(base)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "of 1 searches find the winner" in ended.stdout


@pytest.mark.parametrize("name", ["scoring_bench", "bench"])
def test_a_benchmark_finds_equal_numbers(runs: Path, base: Path, name: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), "--quick", "--base", str(base)],
        env={**os.environ, "LORA_RUNS": str(runs), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    rows = json.loads((BUILD / f"{name}_quick.json").read_text())
    equal = [row for row in rows if row["unit"] == "nats"]
    assert len(equal) >= 2
    assert all(row["holds"] for row in equal)
