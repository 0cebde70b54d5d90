"""Training stages of the tiny recipe, and ways to run and interrupt them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import save_pairs, save_tiny_model, tiny_recipe
from torch import Tensor

from pipelines.config.experiments import Experiment, control_experiments
from pipelines.config.recipe import parse_recipe
from pipelines.runtime import launcher
from pipelines.runtime.interfaces.results import TrainResult
from pipelines.runtime.stage import read_records
from pipelines.training import train as train_module
from pipelines.workflow.stages import PreparedData, Stages, TrainStage

ADAPTER_FILE = "adapter/adapter_model.safetensors"
MODEL_FILE = "model/model.safetensors"
RUN_LAUNCHED = """
import subprocess
import sys
from pathlib import Path

folder, log, repository = sys.argv[1:]
sys.path.insert(0, repository)
from pipelines.runtime import launcher

subprocess.run(
    launcher.accelerate_argv("cpu_zero2", 2, Path(folder)),
    env=launcher._environment(1),
    stdout=open(log, "w"),
    stderr=subprocess.STDOUT,
    preexec_fn=launcher.die_with_parent,
)
"""
"""Program that launches a training and waits for it, as a run does."""


@dataclass(frozen=True)
class TrainingStages:
    """Makes training stages whose base and data are prepared once."""

    root: Path

    @classmethod
    def prepare(cls, root: Path) -> "TrainingStages":
        """Save the tiny model and its rows."""
        save_tiny_model(root / "model")
        save_pairs(root / "pairs.jsonl")
        return cls(root)

    def __call__(
        self,
        rank: int | None,
        runs: str = "runs",
        first_steps: int | None = None,
        **changes: dict[str, Any],
    ) -> TrainStage:
        """Return the stage of an adapter, or of the control if `rank` is None.

        Args:
            rank: of the adapter.
            runs: name of the folder of runs.
            first_steps: steps of a trial; None for the whole training.
            changes: merged into the sections of the recipe.
        """
        recipe = tiny_recipe(self.root / "model", self.root / "pairs.jsonl", **changes)
        stages = Stages(parse_recipe(recipe), self.root / runs)
        base = launcher.ensure_result(stages.base(), threads=1)
        data_stage = stages.data(base)
        data = PreparedData(data_stage, launcher.ensure_result(data_stage, threads=1))
        if rank is None:
            experiment = control_experiments(stages.recipe)[0]
        else:
            learning_rate = stages.recipe.lora.learning_rate
            experiment = Experiment(f"rank-{rank}", "lora", learning_rate, rank)
        return stages.train(base, data, experiment, first_steps)


def launch_training(
    stage: TrainStage, config: str = "cpu_single", processes: int = 1
) -> TrainResult:
    """Train in child processes; return the result."""
    argv = launcher.accelerate_argv(config, processes, stage.begin())
    return launcher.run_child([stage], argv, threads=1)[0]


def losses_of(stage: TrainStage) -> list[float]:
    """Return the loss of each step."""
    return [row["loss"] for row in read_records(stage.folder / "metrics.jsonl")]


def adapter_of(stage: TrainStage) -> dict[str, Tensor]:
    """Return the saved adapter."""
    return load_file(str(stage.folder / ADAPTER_FILE))


def latest_checkpoint(stage: TrainStage) -> Path:
    """Return the folder of the newest checkpoint."""
    return sorted((stage.folder / "checkpoints").glob("step-*"))[-1]


def checkpoint_weights(stage: TrainStage) -> dict[str, Tensor]:
    """Return the weights in the newest checkpoint."""
    return load_file(str(latest_checkpoint(stage) / "weights.safetensors"))


def train_interrupted(stage: TrainStage, monkeypatch: pytest.MonkeyPatch, *, steps: int) -> None:
    """Train in this process and interrupt the run after `steps` steps."""
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", _interrupted_after(steps))
        with pytest.raises(KeyboardInterrupt):
            train_module.train(stage.begin())


def _interrupted_after(steps: int) -> Callable[..., dict[str, Any]]:
    train_step = train_module.train_step
    done: list[int] = []

    def step(*arguments: Any) -> dict[str, Any]:
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        return train_step(*arguments)

    return step


def train_and_kill(stage: TrainStage, *, after_steps: int) -> int:
    """Launch a training, kill its launcher with SIGKILL; return the number of finished steps."""
    folder = stage.begin()
    log = folder.parent / "killed.txt"
    arguments = [str(folder), str(log), str(launcher.REPOSITORY)]
    run = subprocess.Popen([sys.executable, "-c", RUN_LAUNCHED, *arguments])
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and run.poll() is None:
        if metrics.is_file() and metrics.read_text().count("\n") >= after_steps:
            break
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    return metrics.read_text().count("\n")


def processes_left(stage: TrainStage, *, seconds: float) -> list[Path]:
    """Wait up to `seconds` for a stage's processes to end; return those that are still alive."""
    deadline = time.monotonic() + seconds
    while _processes_of(stage) and time.monotonic() < deadline:
        time.sleep(0.2)
    return _processes_of(stage)


def _processes_of(stage: TrainStage) -> list[Path]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(stage.folder).encode() in command and int(process.name) != os.getpid():
            found.append(process)
    return found
