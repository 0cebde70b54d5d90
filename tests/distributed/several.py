"""Run several trainings in one group of processes, which is started only once.

    accelerate launch … several.py FOLDER[:STOP] [FOLDER[:STOP] ...]

`pipelines.training.train` runs each as a separate run. A training with STOP is interrupted after
that many steps, on every rank, without any cleanup.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from pipelines.runtime.child import die_with_parent
from pipelines.training import train as training


class InterruptedRunError(Exception):
    """Represents whatever ends a run."""


def main() -> None:
    """Run the trainings that the command line names."""
    die_with_parent()
    for word in sys.argv[1:]:
        folder, _, stop = word.partition(":")
        if stop:
            interrupt(Path(folder), int(stop))
        else:
            training.train(Path(folder))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def interrupt(folder: Path, steps: int) -> None:
    """Train, and interrupt the run after that many steps."""
    step_of = training.train_step

    def step(run: Any, engine: Any, number: int) -> Any:
        if number >= steps:
            raise InterruptedRunError
        return step_of(run, engine, number)

    training.train_step = step
    try:
        training.train(folder)
    except InterruptedRunError:
        pass
    finally:
        training.train_step = step_of


if __name__ == "__main__":
    main()
