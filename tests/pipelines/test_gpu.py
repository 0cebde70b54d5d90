"""A complete run on a GPU, if there is one; the other tests run on the CPU."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from prefect_host import LORA
from tiny import save_pairs, save_tiny_model, tiny_recipe

GPUS = os.environ["LORA_TEST_GPUS"]
HAS_GPU = GPUS not in ("", "-1") and any(Path("/dev").glob("nvidia[0-9]*"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.server,
    pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("config", ["gpu_ddp", "gpu_zero2"])
def test_a_run_on_a_gpu_is_complete(tmp_path: Path, config: str) -> None:
    recipe = tiny_recipe(
        save_tiny_model(tmp_path / "model"),
        save_pairs(tmp_path / "pairs.jsonl"),
        launch={"config": config},
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CUDA_VISIBLE_DEVICES", "PREFECT_API_URL", "PREFECT_HOME")
    }
    shown = {} if GPUS == "all" else {"CUDA_VISIBLE_DEVICES": GPUS}
    ended = subprocess.run(
        [LORA, "run", "tiny.yaml"],
        cwd=tmp_path,
        env={**kept, **shown, "LORA_RUNS": str(tmp_path / "runs")},
        stderr=subprocess.PIPE,
        text=True,
        timeout=500,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    logs = [path.read_text() for path in (tmp_path / "runs" / "train").glob("*/log.txt")]
    assert len(logs) == 3 and all("device cuda:0" in log for log in logs)
    values = json.loads((tmp_path / "runs" / "pairs_tiny_cpu" / "summary.json").read_text())
    assert list(values["models"]) == ["base", "base-nf4", "control", "rank-2", "rank-4"]
