"""What spreads a training over processes: one process, DDP, or DeepSpeed's ZeRO 1 to 3, as the launch config says.

The same calls serve all of them. Under ZeRO-3 no rank holds a weight between the passes that need it: DeepSpeed gathers
what a module reads, whoever owns it, while the objective is called, and what is saved is gathered first.
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
from pipelines.training.objective import Objective, trained_parameters
from pipelines.training.optimizers import PEAK, build

MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Dtype of the computation → accelerate's name for it; fp16 comes with a scaled loss."""


@dataclass(frozen=True)
class Engine:
    """An objective under an engine, with its optimiser."""

    accelerator: Accelerator
    objective: Objective
    """As it was built; what it holds of a weight is the engine's affair."""
    wrapped: Any
    """As the engine wants it called."""
    optimizer: Any

    @property
    def zero_stage(self) -> int:
        """Return DeepSpeed's stage; 0 for what is none of its."""
        return zero_stage(self.accelerator)

    @property
    def model(self) -> PreTrainedModel:
        return self.objective.model

    @property
    def ranks(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and prints."""
        return bool(self.accelerator.is_main_process)

    def set_lr(self, share: float) -> float:
        """Set each group's learning rate to a share of its peak; return the first one's."""
        for group in self.optimizer.param_groups:
            group["lr"] = share * group[PEAK]
        return float(self.optimizer.param_groups[0]["lr"])

    def fill_gradients(self) -> None:
        """Give what took no part in a step, such as an expert that no token was sent to, a gradient of zero, as ZeRO does."""
        if self.accelerator.sync_gradients and not self.zero_stage:
            for parameter in trained_parameters(self.objective).values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def gradient_norm(self, limit: float) -> float | None:
        """Shorten the gradient to `limit` and return its former length, of all parts and ranks of a step, at its end; None before.

        DeepSpeed has shortened it itself.
        """
        if not self.accelerator.sync_gradients:
            return None
        if self.zero_stage:
            norm = self.wrapped.get_global_grad_norm()
        else:
            norm = self.accelerator.clip_grad_norm_(
                trained_parameters(self.objective).values(), limit
            )
        return None if norm is None else float(norm)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold every trained weight whole on every rank inside a block; all ranks enter it."""
        if self.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trained_parameters(self.objective).values())):
            yield


def start(seed: int, options: dict[str, Any], hardware: Hardware, *, full: bool) -> Accelerator:
    """Join the process group and hold it against what was asked for.

    Naming the backend matters: without it, DeepSpeed on CPUs leaves every rank alone with all of the data. Float32 masters are
    computed under autocast. Adapters choose their dtypes themselves, over a base that computes as it does when it is scored.
    """
    if options["device"] == "gpu" and hardware.device == "cpu":
        raise PipelineError(
            f"launch.config is one for GPUs, and PyTorch {torch.__version__} sees none on {gethostname()}; see that driver and build are "
            "for the same CUDA and CUDA_VISIBLE_DEVICES names what is there, or take the launch of the same name that begins with cpu_"
        )
    torch.manual_seed(seed + int(os.environ.get("RANK", "0")))
    accelerator = Accelerator(
        cpu=hardware.device == "cpu" and not is_deepspeed(),
        gradient_accumulation_steps=options["gradient_accumulation_steps"],
        mixed_precision=_mixed_precision(hardware, full=full),
        kwargs_handlers=[
            *([] if full or is_deepspeed() else [AutocastKwargs(enabled=False)]),
            *(
                [_process_group(hardware, options["timeout_seconds"])]
                if "WORLD_SIZE" in os.environ
                else []
            ),
        ],
    )
    if accelerator.num_processes != options["processes"]:
        raise PipelineError(
            f"{accelerator.num_processes} ranks came up where launch.processes asks for {options['processes']}; "
            "check that the accelerate config fits the machine"
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
    """Hand a model and its optimiser to accelerate, which shards them as the launch config says.

    Args:
        accelerator: see `start`.
        reader: of a model that is frozen but for what is trained, whose weights the optimiser takes up.
        groups: what AdamW trains, each with its peak rate.
        optimizer: see `pipelines.models.hardware.choose_optimizer`.
        max_grad_norm: gradients longer than this are shortened to it.
    """
    objective = Objective(reader.model, reader)
    if zero_stage(accelerator) == 3 and not reader.packed and accelerator.num_processes > 1:
        raise PipelineError(
            f"base model family {reader.model.config.model_type!r} is read one example at a time, and under ZeRO-3 every rank would have "
            "to read as many; take a launch.config with ddp, zero1 or zero2"
        )
    if zero_stage(accelerator):
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = max_grad_norm
    wrapped, prepared = accelerator.prepare(
        objective, build(optimizer, groups, has_masters=bool(zero_stage(accelerator)))
    )
    return Engine(accelerator, objective, wrapped, prepared)


def zero_stage(accelerator: Accelerator) -> int:
    """Return DeepSpeed's stage; 0 for what is none of its."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else int(plugin.zero_stage)


@contextmanager
def disable_zero_init() -> Iterator[None]:
    """Let a model be loaded whole inside a block: with DeepSpeed's plugin set, transformers would share it out while it loads."""
    from transformers.integrations import deepspeed

    config = deepspeed.deepspeed_config()
    if config is None:
        yield
        return
    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def _mixed_precision(hardware: Hardware, *, full: bool) -> str:
    """Return accelerate's name of the precision; in float16 it scales the loss of adapters as well."""
    by_autocast = full or is_deepspeed() or hardware.dtype is torch.float16
    return MIXED_PRECISION[hardware.dtype] if by_autocast else "no"


def _process_group(hardware: Hardware, seconds: int) -> InitProcessGroupKwargs:
    """Name the backend, and how long a rank waits for another before it gives up."""
    return InitProcessGroupKwargs(backend=hardware.backend, timeout=timedelta(seconds=seconds))


def is_deepspeed() -> bool:
    """Return whether the launch hands the training to DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
