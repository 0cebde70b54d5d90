"""The optimiser of a training: what its choice depends on, which `pipelines.models.hardware` makes, and how each is built."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from lora_core.budget.budget import budget
from lora_core.budget.setup import Setup
from pipelines.errors import PipelineError
from pipelines.models.hardware import FUSED, PAGED, AdamState, Hardware, Optimizer, choose_optimizer
from pipelines.planning.plan import gpu_setup

PEAK = "initial_lr"
"""Key of an optimiser's group for its peak rate; PyTorch's schedules name it so."""
Values = Mapping[str, Any]


def optimizer_of(
    accelerator: Accelerator,
    hardware: Hardware,
    model: PreTrainedModel,
    options: Values,
    *,
    full: bool,
    tokens: Callable[[], int],
) -> Optimizer:
    """Choose one for all ranks, by the smallest GPU among theirs. Every rank calls it.

    Args:
        accelerator: see `pipelines.training.engine.start`.
        hardware: this rank's.
        model: what is trained.
        options: the stage's.
        full: every weight is trained.
        tokens: returns the most that a rank handles at once.
    """
    smallest = replace(hardware, gpu_bytes=min(gather_object([hardware.gpu_bytes])))
    needed = full_bytes(model, options, tokens()) if full and smallest.gpu_bytes else None
    return choose_optimizer(smallest, state_under(accelerator), needed)


def _check_precision(groups: list[dict[str, Any]]) -> None:
    held = {parameter.dtype for group in groups for parameter in group["params"]}
    for dtype in sorted(held & {torch.bfloat16, torch.float16}, key=str):
        raise PipelineError(
            f"AdamW would train weights of {str(dtype).removeprefix('torch.')}, in which an update smaller than the spacing of "
            "their values is lost; hold what is trained in float32 (load_model with masters=True) and compute in 16 bits under autocast"
        )


def full_bytes(model: PreTrainedModel, options: Values, tokens: int) -> int:
    """Return what full fine-tuning without an engine is estimated to need of a GPU."""
    setup = Setup(
        "full",
        tokens,
        processes=options["processes"],
        checkpointing=options["gradient_checkpointing"],
    )
    return budget(model, gpu_setup(setup)).memory_bytes


def state_under(accelerator: Accelerator) -> AdamState:
    """Return what the engine will do with Adam's state."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage == 0:
        return "whole"
    config = plugin.deepspeed_config
    offloads = (
        config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    )
    return "replaced" if offloads and config.get("zero_force_ds_cpu_optimizer", True) else "shared"


def build(
    optimizer: Optimizer, groups: list[dict[str, Any]], *, has_masters: bool = False
) -> torch.optim.Optimizer:
    """Return an AdamW over groups of parameters, each with its peak rate.

    Args:
        optimizer: which one.
        groups: what it trains.
        has_masters: the engine keeps float32 weights next to those of 16 bits, as DeepSpeed does.

    Raises:
        PipelineError: AdamW would change weights of 16 bits themselves, which loses every update smaller than their spacing.
    """
    if not has_masters:
        _check_precision(groups)
    peaked = [{**group, PEAK: group["lr"]} for group in groups]
    if optimizer.name == PAGED:
        from bitsandbytes.optim.adamw import PagedAdamW8bit

        paged: torch.optim.Optimizer = PagedAdamW8bit(peaked)  # type: ignore[no-untyped-call]
        return paged
    return torch.optim.AdamW(peaked, fused=optimizer.name == FUSED)
