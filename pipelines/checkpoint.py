"""Checkpoints of a training run: complete or absent, and the newest complete one is where a stopped run goes on.

    <stage>/checkpoints/2-ranks-zero-2/step-00010/    adapter or weights, optimiser, schedule, every rank's random state

Under another launch the parts of a checkpoint would not fit, so each kind of launch finds its own.

What is saved is the trained part, and the start that a layer takes off again where it has one: another machine may find
other signs for it. The frozen base is loaded again from where it lies.
"""

import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

KEPT = 2


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write the state after `step` steps and keep the newest two. Every rank calls it; rank 0 renames."""
    complete = _folder(accelerator, folder) / f"step-{step:05d}"
    aside = complete.with_name(f".{complete.name}")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    hook = accelerator.register_save_state_pre_hook(_leave_out_frozen)
    accelerator.save_state(str(aside), **({"exclude_frozen_parameters": True} if _has_engine(accelerator) else {}))
    hook.remove()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(complete, ignore_errors=True)
        aside.rename(complete)
        for old in _complete(accelerator, folder)[:-KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def exists(accelerator: Accelerator, folder: Path) -> bool:
    """Tell whether there is a complete checkpoint to go on from."""
    return bool(_complete(accelerator, folder))


def resume(accelerator: Accelerator, folder: Path) -> int:
    """Restore the newest complete checkpoint; return how many steps it holds, 0 when there is none."""
    found = _complete(accelerator, folder)
    if not found:
        return 0
    accelerator.load_state(str(found[-1]), **{"load_module_strict" if _has_engine(accelerator) else "strict": False})
    return int(found[-1].name.removeprefix("step-"))


def discard(folder: Path) -> None:
    """Remove all checkpoints: the run has ended and its outcome is saved."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _has_engine(accelerator: Accelerator) -> bool:
    """Tell whether DeepSpeed saves and loads the model, under options of its own."""
    return bool(accelerator.distributed_type == "DEEPSPEED")


def _leave_out_frozen(models: list[Any], states: list[dict[str, Any]], _: str) -> None:
    """Take out of each model's state what is not trained; there are none where an engine saves them."""
    for model, state in zip(models, states, strict=False):
        kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad} | {
            name for name, _ in model.named_buffers()
        }
        for name in state.keys() - kept:
            del state[name]


def _folder(accelerator: Accelerator, folder: Path) -> Path:
    engine = f"-zero-{accelerator.state.deepspeed_plugin.zero_stage}" if _has_engine(accelerator) else ""
    return folder / "checkpoints" / f"{accelerator.num_processes}-ranks{engine}"


def _complete(accelerator: Accelerator, folder: Path) -> list[Path]:
    return sorted(_folder(accelerator, folder).glob("step-*"))
