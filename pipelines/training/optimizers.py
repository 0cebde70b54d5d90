"""Choose and build the optimizer of a training; `pipelines.models.hardware` has the rule."""

from collections.abc import Callable
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
from pipelines.runtime.interfaces.inputs import TrainOptions

PEAK_LR = "initial_lr"
"""Key of the peak learning rate in an optimizer's group, as in PyTorch's schedules."""


def select_optimizer(
    accelerator: Accelerator,
    hardware: Hardware,
    model: PreTrainedModel,
    options: TrainOptions,
    *,
    full: bool,
    tokens: Callable[[], int],
) -> Optimizer:
    """Choose one optimizer for all ranks, by their smallest GPU. A collective: every rank calls it.

    Args:
        accelerator: see `pipelines.training.engine.start`.
        hardware: this rank's.
        model: what is trained.
        options: the stage's.
        full: every weight is trained.
        tokens: returns the largest number of tokens that a rank processes at once.
    """
    gpu_bytes = min(gather_object([hardware.gpu_bytes]))
    smallest = replace(hardware, gpu_bytes=gpu_bytes)
    needed = None
    if full and gpu_bytes:
        needed = full_bytes(model, options, tokens(), hardware.dtype)
    return choose_optimizer(smallest, adam_state_under(accelerator), needed)


def full_bytes(
    model: PreTrainedModel, options: TrainOptions, tokens: int, dtype: torch.dtype
) -> int:
    """Return the estimated GPU memory of full fine-tuning without an engine.

    Args:
        model: what is trained.
        options: number of processes, and gradient checkpointing.
        tokens: that a rank reads at once.
        dtype: of the computation.
    """
    setup = Setup(
        "full",
        tokens,
        processes=options.processes,
        checkpointing=options.gradient_checkpointing,
    )
    return budget(model, gpu_setup(setup, compute_bytes=dtype.itemsize)).memory_bytes


def adam_state_under(accelerator: Accelerator) -> AdamState:
    """Return what the engine will do with Adam's state."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage == 0:
        return "whole"
    config = plugin.deepspeed_config
    offload = config["zero_optimization"].get("offload_optimizer", {})
    offloads = offload.get("device", "none") != "none"
    if offloads and config.get("zero_force_ds_cpu_optimizer", True):
        return "replaced"
    return "shared"


def build(
    optimizer: Optimizer, groups: list[dict[str, Any]], *, has_masters: bool = False
) -> torch.optim.Optimizer:
    """Return an AdamW over groups of parameters, each with its peak learning rate.

    Args:
        optimizer: which one.
        groups: what it trains.
        has_masters: the engine keeps float32 weights next to those of 16 bits, as DeepSpeed does.

    Raises:
        PipelineError: AdamW would update 16-bit weights directly, which loses every update smaller
            than their spacing.
    """
    if not has_masters:
        _check_precision(groups)
    with_peaks = [{**group, PEAK_LR: group["lr"]} for group in groups]
    if optimizer.name == PAGED:
        from bitsandbytes.optim.adamw import PagedAdamW8bit

        paged: torch.optim.Optimizer = PagedAdamW8bit(with_peaks)  # type: ignore[no-untyped-call]
        return paged
    return torch.optim.AdamW(with_peaks, fused=optimizer.name == FUSED)


def _check_precision(groups: list[dict[str, Any]]) -> None:
    dtypes = {parameter.dtype for group in groups for parameter in group["params"]}
    for dtype in sorted(dtypes & {torch.bfloat16, torch.float16}, key=str):
        raise PipelineError(
            f"AdamW would train weights of {str(dtype).removeprefix('torch.')}, in which an update "
            "smaller than the spacing of their values is lost; hold the trained weights in float32 "
            "(load_model with masters=True) and compute in 16 bits under autocast"
        )
