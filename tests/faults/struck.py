"""Run a training with a fault inside its ranks that no signal and no damaged file can cause.

accelerate launch … struck.py KIND:STEP:RANK FOLDER

nan       the rank's loss of that step is not a number
row       an example of that step cannot be read, on every rank
memory    from that step on the system refuses memory to the rank
"""

import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from pipelines.runtime import launcher
from pipelines.runtime.child import die_with_parent, errors_recorded
from pipelines.training import objective
from pipelines.training import train as training

ROOM_BYTES = 1 << 26
"""For what a step itself allocates, such as code of kernels; `larger` needs four times that."""
Step = Callable[..., dict[str, Any]]


def strike(argv: list[str], word: str) -> list[str]:
    """Return a training's command with the fault; its last words are the module and the folder."""
    return [*argv[:-3], str(Path(__file__)), word, argv[-1]]


def strike_launches(word: str) -> None:
    """Inject the fault into every training that this process launches."""
    plain = launcher.accelerate_argv
    launcher.accelerate_argv = lambda *arguments: strike(plain(*arguments), word)


def main() -> None:
    """Train as `pipelines.training.train` does, with the fault that the command line names."""
    word, folder = sys.argv[1], Path(sys.argv[2])
    kind, step, rank = word.split(":")
    faults = {"nan": not_a_number, "row": unreadable_row, "memory": no_memory}
    training.train_step = faults[kind](training.train_step, int(step), int(rank))
    die_with_parent()
    with errors_recorded(folder):
        training.train(folder)
    torch.distributed.destroy_process_group()


def not_a_number(step_of: Step, at: int, rank: int) -> Step:
    """Set the rank's loss to NaN, as an overflow does."""
    forward = objective.Objective.forward

    def step(run: Any, engine: Any, number: int) -> Any:
        struck = number + 1 == at and engine.accelerator.process_index == rank
        objective.Objective.forward = (
            (lambda self, part: forward(self, part) * torch.nan) if struck else forward
        )
        return step_of(run, engine, number)

    return step


def unreadable_row(step_of: Step, at: int, rank: int) -> Step:
    """Let reading the step's first example fail, as a bad sector does."""

    def step(run: Any, engine: Any, number: int) -> Any:
        if number + 1 >= at:
            run = replace(run, dataset=BadSector(run.dataset, run.steps[at - 1][rank]))
        return step_of(run, engine, number)

    return step


def no_memory(step_of: Step, at: int, rank: int) -> Step:
    """Limit the rank to its current memory, and let the step allocate more."""
    forward = objective.Objective.forward

    def larger(self: Any, part: Any) -> Any:
        return forward(self, part) + torch.ones(1 << 26).sum() * 0

    def step(run: Any, engine: Any, number: int) -> Any:
        if number + 1 == at and engine.accelerator.process_index == rank:
            limit = psutil.Process().memory_info().vms + ROOM_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            objective.Objective.forward = larger
        return step_of(run, engine, number)

    return step


class BadSector:
    """Rows, one of which is unreadable."""

    def __init__(self, rows: Any, index: int) -> None:
        self.rows = rows
        self.index = index

    def __getitem__(self, index: int) -> Any:
        if index == self.index:
            raise OSError(5, "Input/output error")
        return self.rows[index]


if __name__ == "__main__":
    main()
