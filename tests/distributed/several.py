"""Several trainings in one group of processes, one after the other: what starts a group once costs its start-up once.

    accelerate launch … several.py FOLDER[:STOP] [FOLDER[:STOP] ...]

Each is trained by `pipelines.training.train` as a run of its own would be; one with STOP is broken off when so many steps
are done, on every rank, and nothing of it is tidied up.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from pipelines.runtime.child import die_with_parent
from pipelines.training import train as training


class BrokenOffError(Exception):
    """Stands for whatever ends a run."""


def main() -> None:
    """Train what the command line names."""
    die_with_parent()
    for word in sys.argv[1:]:
        folder, _, stop = word.partition(":")
        if stop:
            break_off(Path(folder), int(stop))
        else:
            training.train(Path(folder))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def break_off(folder: Path, steps: int) -> None:
    """Train until so many steps are done."""
    step_of = training.train_step

    def step(run: Any, engine: Any, number: int) -> Any:
        if number >= steps:
            raise BrokenOffError
        return step_of(run, engine, number)

    training.train_step = step
    try:
        training.train(folder)
    except BrokenOffError:
        pass
    finally:
        training.train_step = step_of


if __name__ == "__main__":
    main()
