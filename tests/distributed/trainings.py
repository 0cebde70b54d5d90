"""Tiny trainings of every kind, shared by the tests and the printed matrix of launches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from tiny import save_pairs, save_tiny_model, tiny_recipe
from torch import Tensor

from pipelines.config.experiments import Experiment, control_experiments
from pipelines.config.recipe import RECIPES, parse_recipe
from pipelines.config.sections import LaunchSection
from pipelines.paths import runs_root
from pipelines.runtime import launcher
from pipelines.runtime.stage import read_records
from pipelines.workflow.stages import PreparedData, Stages, TrainStage

METHODS = {"LoRA": "none", "QLoRA": "nf4", "full": "none"}
"""Name → how the base is stored."""
LAUNCHES = ("cpu_ddp", "cpu_zero1", "cpu_zero2", "cpu_zero3", "cpu_zero3_offload")
SEVERAL = Path(__file__).with_name("several.py")
RANK = 4
DEFAULT = RECIPES / "docstrings_smollm2_cpu.yaml"


@dataclass(frozen=True)
class Trainings:
    """Makes training stages over one tiny model and its data."""

    root: Path

    @classmethod
    def prepare(cls, root: Path) -> "Trainings":
        """Save the model and the rows."""
        save_tiny_model(root / "model")
        save_pairs(root / "pairs.jsonl")
        return cls(root)

    def stage(self, method: str, runs: str, processes: int = 1, **changes: Any) -> TrainStage:
        """Return a started stage in a separate folder of runs."""
        changes = {
            "base_model": {"quantization": METHODS[method]},
            "launch": {"processes": processes},
            **changes,
        }
        recipe = parse_recipe(
            tiny_recipe(self.root / "model", self.root / "pairs.jsonl", **changes)
        )
        stages = Stages(recipe, self.root / runs)
        base = launcher.ensure_result(Stages(recipe, self.root / "shared").base(), threads=1)
        data_stage = Stages(recipe, self.root / "shared").data(base)
        data = PreparedData(data_stage, launcher.ensure_result(data_stage, threads=1))
        experiment = (
            control_experiments(recipe)[0]
            if method == "full"
            else Experiment(f"rank-{RANK}", "lora", recipe.lora.learning_rate, RANK)
        )
        stage = stages.train(base, data, experiment)
        stage.begin()
        return stage


def train_all(config: str, processes: int, words: list[str], log: Path) -> None:
    """Run the trainings that the words name (see `several`) in one group of processes.

    Raises:
        AssertionError: a training failed; with the log.
    """
    argv = launcher.accelerate_argv(config, processes, Path())
    argv = [*argv[: argv.index("-m", 3)], str(SEVERAL), *words]
    with log.open("wb") as stream:
        status = launcher.run_joined_ranks(
            argv, stream, threads=1, on_cpu=True, until=lambda: False
        )
    assert status == 0, log.read_text()[-3000:]


def losses(stage: TrainStage) -> list[float]:
    """Return the loss of each step."""
    return [row["loss"] for row in read_records(stage.folder / "metrics.jsonl")]


def outcome(stage: TrainStage) -> dict[str, Tensor]:
    """Return what was trained."""
    file = (
        "model/model.safetensors"
        if stage.inputs.method == "full"
        else "adapter/adapter_model.safetensors"
    )
    return load_file(str(stage.folder / file))


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference of any tensor, as a fraction of its norm."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    return max(
        float((tensor - other[name]).norm() / tensor.norm().clamp(min=1e-6))
        for name, tensor in one.items()
    )


def embedded_stage(runs: Path, method: str, settings: LaunchSection, **training: Any) -> TrainStage:
    """Return the started stage of the default recipe's rank 4 (QLoRA) or control (full).

    Base and data are those of the default run.
    """
    changes = {"launch": settings.model_dump(), "training": training}
    values: dict[str, Any] = yaml.safe_load(DEFAULT.read_text())
    recipe = parse_recipe(
        {**values, **{name: {**values[name], **change} for name, change in changes.items()}}
    )
    shared = Stages(recipe, runs_root())
    base = launcher.ensure_result(shared.base(), threads=2)
    data_stage = shared.data(base)
    data = PreparedData(data_stage, launcher.ensure_result(data_stage, threads=2))
    experiment = (
        control_experiments(recipe)[0]
        if method == "full"
        else Experiment(f"rank-{RANK}", "lora", recipe.lora.learning_rate, RANK)
    )
    stage = Stages(recipe, runs).train(base, data, experiment)
    stage.begin()
    return stage
