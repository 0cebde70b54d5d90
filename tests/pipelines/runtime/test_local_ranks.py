"""Forked ranks have the environment that accelerate's launcher gives, and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.runtime import launcher, local_ranks

REPORT = """
import json, os, sys

folder = sys.argv[1]
variables = {name: text for name, text in os.environ.items()}
rank = os.environ.get("RANK", "0")
with open(f"{folder}/rank-{rank}.json", "w") as stream:
    json.dump(variables, stream)
if sys.argv[2:] == ["gather"]:
    import torch.distributed as dist
    from accelerate import Accelerator
    from accelerate.utils import gather_object
    accelerator = Accelerator(cpu=True)
    ids = gather_object([accelerator.process_index])
    with open(f"{folder}/gathered-{rank}.json", "w") as stream:
        json.dump(ids, stream)
    dist.destroy_process_group()
"""
WAITING = """
import os, signal, sys, time
if os.environ["RANK"] == sys.argv[1]:
    os.kill(os.getpid(), int(sys.argv[2])) if int(sys.argv[2]) else sys.exit(3)
time.sleep(60)
"""
OF_ONE_LAUNCH = {
    "MASTER_ADDR",  # torchrun names the host
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_ERROR_FILE",
    "TORCHELASTIC_SIGNALS_TO_HANDLE",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # DeepSpeed sets it when it is imported
    "_MLFLOW_TELEMETRY_SESSION_ID",  # MLflow, too
}
"""Variables that name one launch, or that a library sets in its own process."""


def argv_of(module: str, config: str, script: Path, *arguments: str) -> list[str]:
    """Return the command that runs a script on two ranks, or one for cpu_single."""
    processes = 1 if config == "cpu_single" else 2
    argv = launcher.accelerate_argv(config, processes, Path())
    last = argv.index("-m", 3)
    return [sys.executable, "-m", module, *argv[3:last], str(script), *arguments]


def variables_of(argv: list[str], folder: Path, given: dict[str, str]) -> list[dict[str, str]]:
    """Run a report in a given environment; return that of each rank."""
    folder.mkdir()
    subprocess.run([*argv, str(folder)], check=True, timeout=300, env=given)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_single", "cpu_ddp", "cpu_zero2"])
def test_ranks_have_the_environment_of_accelerates_launcher(config: str, tmp_path: Path) -> None:
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    given = environment()  # once: a library of another test may add a variable at any time
    theirs = argv_of(launcher.ACCELERATE, config, script)
    expected = variables_of(theirs, tmp_path / "accelerate", given)
    ours = variables_of(argv_of(launcher.LOCAL_RANKS, config, script), tmp_path / "forked", given)
    assert len(ours) == len(expected) == (1 if config == "cpu_single" else 2)
    for one, other in zip(ours, expected, strict=True):
        different = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
        assert different <= OF_ONE_LAUNCH
        assert ("MASTER_PORT" in one) == ("MASTER_PORT" in other)


def test_ranks_form_a_process_group(tmp_path: Path) -> None:
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    argv = argv_of(launcher.LOCAL_RANKS, "cpu_ddp", script, str(tmp_path), "gather")
    subprocess.run(argv, check=True, timeout=300, env=environment())
    gathered = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("gathered-*.json"))]
    assert gathered == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("number", "how"), [(0, "with status 3"), (signal.SIGKILL, "by SIGKILL")], ids=["exit", "kill"]
)
def test_a_failed_rank_is_named_and_ends_the_others(number: int, how: str, tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    argv = argv_of(launcher.LOCAL_RANKS, "cpu_ddp", script, "1", str(int(number)))
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=300, env=environment(), check=False
    )
    assert done.returncode == local_ranks.FAILED
    [line] = [line for line in done.stderr.splitlines() if line.startswith("rank")]
    assert line.startswith("rank 1 (process ")
    assert line.endswith(f"ended {how}")


def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    argv = argv_of(launcher.LOCAL_RANKS, "cpu_ddp", script, "none", "0")
    with subprocess.Popen(argv, env=environment()) as process:
        ranks = wait_for_children(process.pid, 2)
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert alive == []


def wait_for_children(pid: int, count: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 200
    while len(children := psutil.Process(pid).children()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return children
