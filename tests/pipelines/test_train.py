"""Training's laws, with real processes: two ranks equal one, a killed run leaves no process and goes on bit for bit."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import save_pairs, save_tiny_model, tiny_recipe

from pipelines import launch
from pipelines.arms import control_arms, rank_arms
from pipelines.errors import StageError
from pipelines.recipe import parse_recipe
from pipelines.stage import Stage, read_records
from pipelines.stages import Stages

pytestmark = pytest.mark.slow
ZERO2 = {"config": "cpu_zero2", "processes": 2}
MANY_SETTINGS = {"dropout": 0.1, "use_dora": True, "loraplus_ratio": 4, "exclude_modules": ["down_proj"], "layers_to_transform": [1]}
Prepared = Callable[..., Stage]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return what makes a training stage of the tiny recipe, its base and data prepared once."""
    root = tmp_path_factory.mktemp("train")
    model, pairs = save_tiny_model(root / "model"), save_pairs(root / "pairs.jsonl")

    def make(rank: int | None, runs: str = "runs", **changes: dict[str, Any]) -> Stage:
        stages = Stages(parse_recipe(tiny_recipe(model, pairs, **changes)), root / runs)
        base = launch.result_of(stages.base(), "pipelines.base_model", threads=1)
        data_stage = stages.data(base)
        data = (data_stage, launch.result_of(data_stage, "pipelines.data", threads=1))
        arms = {arm.rank: arm for arm in (*control_arms(stages.recipe), *rank_arms(stages.recipe))}
        return stages.train(base, data, arms[rank])

    return make


def _train(stage: Stage, config: str = "cpu_single", processes: int = 1) -> dict[str, Any]:
    return launch.run_child(stage, launch.accelerate_argv(config, processes, stage.begin()), threads=1)


def _losses(stage: Stage) -> list[float]:
    return [row["loss"] for row in read_records(stage.folder / "metrics.jsonl")]


@pytest.mark.parametrize("rank", [4, None], ids=["adapter", "control"])
def test_two_ranks_under_zero2_learn_what_one_process_learns(prepared: Prepared, rank: int | None) -> None:
    """Same batches and the loss over all supervised tokens; what is left is the order of float32 sums."""
    alone, together = prepared(rank), prepared(rank, launch=ZERO2)
    _train(alone)
    figures = _train(together, **ZERO2)
    assert _losses(together) == pytest.approx(_losses(alone), abs=2e-4)
    assert _losses(together)[-1] < _losses(together)[0] - 0.1
    assert figures["steps"] == 6
    assert not (together.folder / "checkpoints").exists()


def test_a_run_killed_in_the_middle_goes_on_bit_for_bit(prepared: Prepared) -> None:
    uninterrupted, killed = (prepared(4, runs, launch=ZERO2, lora=MANY_SETTINGS) for runs in ("whole", "killed"))
    _train(uninterrupted, **ZERO2)
    assert _kill_after(killed, step=3) >= 3
    assert _processes_left(killed, seconds=20) == []
    _train(killed, **ZERO2)
    log = (killed.folder / "log.txt").read_text()
    assert "from step 2" in log
    assert _losses(killed) == _losses(uninterrupted)
    same = [(stage.folder / "adapter" / "adapter_model.safetensors").read_bytes() for stage in (killed, uninterrupted)]
    assert same[0] == same[1]
    keys = load_file(str(killed.folder / "adapter" / "adapter_model.safetensors")).keys()
    assert any(key.endswith("q_proj.lora_magnitude_vector") for key in keys)
    assert not any("layers.0." in key or "down_proj" in key for key in keys)


def test_a_loss_that_is_not_finite_stops_every_rank_and_names_the_step(prepared: Prepared) -> None:
    stage = prepared(4, "broken", launch=ZERO2)
    _break(Path(stage.paths["base"]), stage.folder.parent / "broken-base")
    broken = Stage(stage.kind, stage.label, stage.inputs, stage.root, {**stage.paths, "base": str(stage.folder.parent / "broken-base")})
    with pytest.raises(StageError, match="the loss of step 1 is nan; lower the learning rate"):
        _train(broken, **ZERO2)
    assert not (broken.folder / "adapter").exists()


def test_a_launch_that_brings_up_too_few_ranks_is_refused(prepared: Prepared) -> None:
    stage = prepared(4, launch=ZERO2)
    with pytest.raises(StageError, match=r"1 ranks came up where launch\.processes asks for 2"):
        _train(stage, "cpu_single", 1)


def _kill_after(stage: Stage, *, step: int) -> int:
    """Start training in a process of its own, kill that process with SIGKILL after `step` steps; return the steps done."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); from pipelines import launch;"
        "launch.subprocess.run(launch.accelerate_argv('cpu_zero2', 2, Path(sys.argv[1])), env=launch._environment(1),"
        " stdout=open(sys.argv[2], 'w'), stderr=-2, preexec_fn=launch.die_with_parent)"
    )
    log = stage.begin().parent / "killed.txt"
    argv = [launch.sys.executable, "-c", code, str(stage.folder), str(log), str(launch.REPOSITORY)]
    run = subprocess.Popen(argv)
    metrics = stage.folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and run.poll() is None:
        if metrics.is_file() and metrics.read_text().count("\n") >= step:
            break
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    return metrics.read_text().count("\n")


def _break(base: Path, folder: Path) -> None:
    """Copy a base with a final norm that is not a number."""
    shutil.copytree(base, folder)
    weights = load_file(str(folder / "model.safetensors"))
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _processes_left(stage: Stage, *, seconds: float) -> list[Path]:
    deadline = time.monotonic() + seconds
    while _processes_of(stage) and time.monotonic() < deadline:
        time.sleep(0.2)
    return _processes_of(stage)


def _processes_of(stage: Stage) -> list[Path]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(stage.folder).encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                found.append(process)
        except OSError:
            continue
    return found
