"""Checkpoints of a training run: complete or absent, and the newest complete one is where a stopped run goes on.

    <stage>/checkpoints/step-00010/    adapter or weights, optimiser, schedule, every rank's random state

What is saved is the trained part alone; the frozen base is loaded again from where it lies.
"""

import shutil
from pathlib import Path

from accelerate import Accelerator

KEPT = 2


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write the state after `step` steps and keep the newest two. Every rank calls it; rank 0 renames."""
    complete = _folder(folder, step)
    aside = complete.with_name(f".{complete.name}")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside), **_only_trained(accelerator, exclude_frozen_parameters=True))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(complete, ignore_errors=True)
        aside.rename(complete)
        for old in _complete(folder)[:-KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path) -> int:
    """Restore the newest complete checkpoint; return how many steps it holds, 0 when there is none."""
    found = _complete(folder)
    if not found:
        return 0
    accelerator.load_state(str(found[-1]), **_only_trained(accelerator, load_module_strict=False))
    return int(found[-1].name.removeprefix("step-"))


def discard(folder: Path) -> None:
    """Remove all checkpoints: the run has ended and its outcome is saved."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _only_trained(accelerator: Accelerator, **options: bool) -> dict[str, bool]:
    """Return DeepSpeed's option that leaves frozen weights out; other engines take none."""
    return options if accelerator.distributed_type == "DEEPSPEED" else {}


def _folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:05d}"


def _complete(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))
