"""One contestant of the benchmark: the steps of pipelines.training, in a separate process.

    python tests/benchmarks/ours.py adapter|ours|ours-float32 TASK.json RESULT.json

`ours` computes in the dtype that the pipeline chooses on this machine. `adapter` trains nothing: it
writes the initial adapter of every contestant. This file also contains what all of them share: the
task, the record of a run, and the entry point.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from products import Recorder
from transformers import PreTrainedModel

from lora_core import Identity, save_adapter
from lora_core.files import write_json
from pipelines.data.batches import order
from pipelines.models.forward import PackReader
from pipelines.models.hardware import (
    Hardware,
    choose_optimizer,
    detect,
    detect_for_training,
    peak_memory_bytes,
)
from pipelines.models.loading import load_model
from pipelines.runtime.interfaces.inputs import StagePaths, TrainInputs, TrainOptions
from pipelines.training.build import adapt, parameter_groups, prepare_forward
from pipelines.training.engine import Engine, prepare, start
from pipelines.training.phase_timer import PhaseTimer, clock_of
from pipelines.training.run import Run
from pipelines.training.step import train_step


@dataclass(frozen=True)
class Task:
    """The input of every contestant."""

    inputs: TrainInputs
    paths: StagePaths
    """The base, the data and the adapter to start from."""
    steps: int
    checkpointing: bool = False
    """Gradient checkpointing."""
    products: bool = False
    """Also measure the matrix products of a step alone."""

    @classmethod
    def read(cls, file: Path) -> "Task":
        """Read a task from a JSON file."""
        values = json.loads(file.read_text())
        inputs = TrainInputs.model_validate(values["inputs"])
        paths = StagePaths.model_validate(values["paths"])
        products = values.get("products", False)
        return cls(inputs, paths, values["steps"], values["checkpointing"], products)

    def model(self, hardware: Hardware) -> PreTrainedModel:
        """Load the base."""
        return load_model(self.paths.required("base"), self.inputs.quantization, hardware)

    @property
    def is_full(self) -> bool:
        """Whether every weight is trained."""
        return self.inputs.method == "full"

    def dataset(self) -> Dataset:
        """Return the training examples."""
        return load_from_disk(str(self.paths.required("data") / "train"))

    def order(self, dataset: Dataset) -> list[list[int]]:
        """Return the examples of each step."""
        return order(len(dataset), self.steps, self.inputs.training.batch_size, self.inputs.seed)

    def batches(self) -> list[list[dict[str, Any]]]:
        """Return the examples themselves, step by step."""
        dataset = self.dataset()
        return [[dataset[i] for i in indices] for indices in self.order(dataset)]


@dataclass
class Record:
    """What a contestant records while it trains."""

    losses: list[float] = field(default_factory=list)
    """Mean over the supervised tokens of each step, in nats."""
    ends: list[dict[str, float]] = field(default_factory=list)
    """Per step end: wall clock and CPU time in seconds, peak memory so far in bytes."""
    products_seconds: float | None = None
    """Of the matrix products of the last step alone."""

    def step_ended(self) -> None:
        """Record the end of a step."""
        self.ends.append(
            {
                "clock": time.perf_counter(),
                "cores": time.process_time(),
                "peak": peak_memory_bytes(),
            }
        )


Contestant = Callable[[Task], Record]


def ours(task: Task) -> Record:
    """Train as pipelines.training does; the seed gives the adapter that `write_adapter` saved."""
    return train(task, detect_for_training(task.inputs.training.dtype))


def ours_float32(task: Task) -> Record:
    """Train in float32, whatever this machine multiplies faster."""
    return train(replace(task, products=False), detect_for_training("float32"))


def train(task: Task, hardware: Hardware) -> Record:
    """Take the steps, and measure the products of one more if the task asks for it."""
    record = Record()
    run, engine = engine_of(task, hardware)
    for step in range(task.steps):
        record.losses.append(train_step(run, engine, step)["loss"])
        record.step_ended()
    if task.products:
        with Recorder() as recorder:
            train_step(run, engine, task.steps - 1)
        record.products_seconds = recorder.seconds()
    return record


def engine_of(task: Task, hardware: Hardware) -> tuple[Run, Engine]:
    """Return the data and what is trained, as pipelines.training builds them, unverified."""
    options = TrainOptions(processes=1, device="cpu", timeout_seconds=600)
    accelerator = start(task.inputs.seed, options, hardware, full=task.is_full)
    model, dataset, settings = task.model(hardware), task.dataset(), task.inputs.training
    adapt(model, task.inputs, examples=(), base=task.paths.required("base"))
    prepare_forward(model, hardware, checkpointing=task.checkpointing)
    run = Run(
        accelerator,
        dataset,
        [len(ids) for ids in dataset["input_ids"]],
        task.order(dataset),
        settings.warmup_steps,
        settings.max_grad_norm,
        hardware.device,
        PhaseTimer(None, clock_of(accelerator.device)),
    )
    engine = prepare(
        accelerator,
        replace(PackReader.default(model), products=hardware.product_dtype),
        parameter_groups(model, task.inputs),
        optimizer=choose_optimizer(hardware, "whole", None),
        max_grad_norm=run.max_grad_norm,
        timer=run.timer,
    )
    return run, engine


def write_adapter(task: Task) -> Record:
    """Write the untrained adapter."""
    model = task.model(detect())
    config = adapt(model, task.inputs, examples=(), base=task.paths.required("base"))
    assert config is not None
    identity = Identity(base=str(task.paths.base))
    save_adapter(model, task.paths.required("adapter"), config, identity)
    return Record()


def run_contestant(contestants: Mapping[str, Contestant]) -> None:
    """Run the contestant of the command line; write its record and the tokens of each step."""
    name, task_file, result_file = sys.argv[1:]
    task = Task.read(Path(task_file))
    record = contestants[name](task)
    tokens = [sum(len(example["input_ids"]) for example in batch) for batch in task.batches()]
    write_json(Path(result_file), {**asdict(record), "tokens": tokens})


if __name__ == "__main__":
    run_contestant({"ours": ours, "ours-float32": ours_float32, "adapter": write_adapter})
