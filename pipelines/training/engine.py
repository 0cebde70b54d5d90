"""Distribute a training over processes: one process, DDP, or DeepSpeed's ZeRO 1 to 3.

The launch config decides which. The same calls serve all of them. Under ZeRO-3 no rank keeps a
complete weight between the passes that need it: DeepSpeed gathers what a module reads while the
objective is called, and weights are gathered before they are saved.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from socket import gethostname
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs
from transformers import PreTrainedModel

from pipelines.errors import PipelineError
from pipelines.models.forward import PackReader
from pipelines.models.hardware import Hardware, Optimizer
from pipelines.runtime.interfaces.inputs import TrainOptions
from pipelines.training.objective import Objective, trained_parameters
from pipelines.training.optimizers import PEAK_LR, build

MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Dtype of the computation → accelerate's name for it; with fp16 it scales the loss."""


@dataclass(frozen=True)
class Engine:
    """An objective under an engine, with its optimizer."""

    accelerator: Accelerator
    objective: Objective
    """As it was built; under ZeRO-3 its weights are shards."""
    wrapped: Any
    """The objective as the engine needs it called."""
    optimizer: Any

    @property
    def zero_stage(self) -> int:
        """Return DeepSpeed's stage; 0 without DeepSpeed."""
        return zero_stage(self.accelerator)

    @property
    def model(self) -> PreTrainedModel:
        return self.objective.model

    @property
    def ranks(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_first(self) -> bool:
        """Return whether this rank writes files and prints."""
        return bool(self.accelerator.is_main_process)

    def set_lr(self, multiplier: float) -> float:
        """Set each group's learning rate to its peak times `multiplier`; return the first one's."""
        for group in self.optimizer.param_groups:
            group["lr"] = multiplier * group[PEAK_LR]
        return float(self.optimizer.param_groups[0]["lr"])

    def fill_gradients(self) -> None:
        """Set missing gradients to zero, as ZeRO does: an expert may have received no token."""
        if self.accelerator.sync_gradients and not self.zero_stage:
            for parameter in trained_parameters(self.objective).values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def clip_gradients(self, max_norm: float) -> float | None:
        """Clip the gradient norm to `max_norm` after a step's last micro-batch; None before it.

        DeepSpeed has already clipped it. Returns the norm before clipping, over all micro-batches
        and ranks of the step. Synchronizes the GPU.
        """
        if not self.accelerator.sync_gradients:
            return None
        if self.zero_stage:
            norm = self.wrapped.get_global_grad_norm()
        else:
            parameters = trained_parameters(self.objective).values()
            norm = self.accelerator.clip_grad_norm_(parameters, max_norm)
        return None if norm is None else float(norm)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather every trained weight on every rank inside a block; every rank enters it."""
        if self.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trained_parameters(self.objective).values())):
            yield


def start(seed: int, options: TrainOptions, hardware: Hardware, *, full: bool) -> Accelerator:
    """Join the process group and check it against the recipe's launch.

    Naming the backend matters: without it, DeepSpeed on CPUs leaves every rank alone with all of
    the data. Float32 master weights are computed under autocast. Adapters choose their dtypes
    themselves, over a base that computes as it does in scoring.
    """
    if options.device == "gpu" and hardware.device == "cpu":
        raise PipelineError(
            f"launch.config is for GPUs, but PyTorch {torch.__version__} finds no GPU on "
            f"{gethostname()}; check that driver and build are for the same CUDA and that "
            "CUDA_VISIBLE_DEVICES names existing GPUs, or use the launch config of the same name "
            "that begins with cpu_"
        )
    torch.manual_seed(seed + int(os.environ.get("RANK", "0")))
    handlers: list[Any] = []
    if not full and not is_deepspeed():
        handlers.append(AutocastKwargs(enabled=False))
    if "WORLD_SIZE" in os.environ:
        handlers.append(_process_group(hardware, options.timeout_seconds))
    accelerator = Accelerator(
        cpu=hardware.device == "cpu" and not is_deepspeed(),
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        mixed_precision=_mixed_precision(hardware, full=full),
        kwargs_handlers=handlers,
    )
    if accelerator.num_processes != options.processes:
        raise PipelineError(
            f"{accelerator.num_processes} ranks started, but launch.processes is "
            f"{options.processes}; check that the accelerate config fits the machine"
        )
    return accelerator


def prepare(
    accelerator: Accelerator,
    reader: PackReader,
    groups: list[dict[str, Any]],
    *,
    optimizer: Optimizer,
    max_grad_norm: float,
) -> Engine:
    """Hand a model and its optimizer to accelerate, which shards them as the launch config defines.

    Args:
        accelerator: see `start`.
        reader: of a model that is frozen except for the trained weights.
        groups: what AdamW trains, each with its peak learning rate.
        optimizer: see `pipelines.models.hardware.choose_optimizer`.
        max_grad_norm: gradients are clipped to this norm.
    """
    stage = zero_stage(accelerator)
    if stage == 3 and not reader.packed and accelerator.num_processes > 1:
        raise PipelineError(
            f"base model family {reader.model.config.model_type!r} is read one example at a time, "
            "and under ZeRO-3 every rank would have to read equally many; use a launch.config with "
            "ddp, zero1 or zero2"
        )
    if stage:
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = max_grad_norm
    objective = Objective(reader.model, reader)
    adamw = build(optimizer, groups, has_masters=bool(stage))
    wrapped, prepared = accelerator.prepare(objective, adamw)
    return Engine(accelerator, objective, wrapped, prepared)


def zero_stage(accelerator: Accelerator) -> int:
    """Return DeepSpeed's stage; 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else int(plugin.zero_stage)


@contextmanager
def disable_zero_init() -> Iterator[None]:
    """Let a model be loaded complete inside a block.

    While DeepSpeed's plugin is set, transformers would shard a model as it loads it.
    """
    from transformers.integrations import deepspeed

    config = deepspeed.deepspeed_config()
    if config is None:
        yield
        return
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def is_deepspeed() -> bool:
    """Return whether the launch hands the training to DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _mixed_precision(hardware: Hardware, *, full: bool) -> str:
    """Return accelerate's name of the precision; in float16 it also scales adapters' loss."""
    by_autocast = full or is_deepspeed() or hardware.dtype is torch.float16
    return MIXED_PRECISION[hardware.dtype] if by_autocast else "no"


def _process_group(hardware: Hardware, seconds: int) -> InitProcessGroupKwargs:
    """Name the backend, and how long a rank waits for another before it gives up."""
    return InitProcessGroupKwargs(backend=hardware.backend, timeout=timedelta(seconds=seconds))
