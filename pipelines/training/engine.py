"""Distribute a training over processes: one process, DDP, or DeepSpeed's ZeRO 1 to 3.

The launch config decides which. The same calls serve all of them. Under ZeRO-3 no rank keeps a
complete weight between the passes that need it: DeepSpeed gathers what a module reads while the
objective is called, and weights are gathered before they are saved.

The engine's collectives are timed as communication, so that a heartbeat shows which ranks wait.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from socket import gethostname
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, gather_object
from torch import Tensor
from transformers import PreTrainedModel

from pipelines.errors import PipelineError
from pipelines.models.forward import PackReader
from pipelines.models.hardware import Hardware, Optimizer
from pipelines.runtime.heartbeats import COMMUNICATION
from pipelines.runtime.interfaces.inputs import TrainOptions
from pipelines.training.gradient_averaging import time_gradient_averaging
from pipelines.training.objective import Objective, trained_parameters
from pipelines.training.optimizers import PEAK_LR, build
from pipelines.training.phase_timer import PhaseTimer

T = TypeVar("T")
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
    timer: PhaseTimer

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

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch; after a step's last one, reduce them over all ranks.

        A collective: every rank calls it, inside `accelerator.accumulate`. For DeepSpeed this is
        what accelerate's own call does, except that it does not take the step.

        Args:
            loss: (), of this rank's micro-batch.
        """
        if not self.zero_stage:
            self.accelerator.backward(loss)
            return
        is_last = self.accelerator.sync_gradients
        self.wrapped.set_gradient_accumulation_boundary(is_boundary=is_last)
        self.wrapped.backward(loss)

    def clip_gradients(self, max_norm: float) -> Tensor | None:
        """Clip the norm of the step's gradients; return it before clipping, without reading it.

        A gradient that is missing is set to zero, as ZeRO does: an expert may have received no
        token.

        Args:
            max_norm: over all trained weights.

        Returns:
            (), over all micro-batches and ranks; None under DeepSpeed, whose step clips.
        """
        if self.zero_stage:
            return None
        parameters = trained_parameters(self.objective).values()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, max_norm)
        return norm

    def update(self) -> None:
        """Take the optimizer step, after the step's last micro-batch; remove the gradients."""
        if self.zero_stage:
            self.wrapped.step()
            return
        self.optimizer.step()
        self.optimizer.zero_grad()

    def deepspeed_grad_norm(self) -> float | None:
        """Return the gradient norm before clipping that DeepSpeed's last step has computed."""
        norm = self.wrapped.get_global_grad_norm()
        return None if norm is None else float(norm)

    def sum_and_read(self, own: Tensor, norm: Tensor | None) -> tuple[float, float | None]:
        """Sum a value over all ranks; return it, and a norm that is read in the same transfer.

        A collective: every rank calls it. It waits for the GPU and for the other ranks.

        Args:
            own: (), of this rank.
            norm: (), the same on every rank; None to read only the sum.
        """
        with self.timer.phase(COMMUNICATION):
            total = self.accelerator.reduce(own, reduction="sum")
            if norm is None:
                return float(total), None
            sum_value, norm_value = torch.stack([total, norm]).tolist()
        return sum_value, norm_value

    def limit_waiting(self, seconds: int) -> None:
        """Limit how long a rank waits for another one in DeepSpeed's collectives.

        DeepSpeed creates its process groups without the timeout of the launch, and PyTorch's
        default is half an hour.

        Args:
            seconds: launch.timeout_seconds.
        """
        if not self.zero_stage:
            return
        for group in (self.wrapped.data_parallel_group, self.wrapped.seq_data_parallel_group):
            group.set_timeout(timedelta(seconds=seconds))

    def gather(self, own: T) -> list[T]:
        """Return every rank's value, by rank. A collective: every rank calls it."""
        with self.timer.phase(COMMUNICATION):
            values: list[T] = gather_object([own])
        return values

    def wait_for_everyone(self) -> None:
        """Wait until every rank calls it. A collective."""
        with self.timer.phase(COMMUNICATION):
            self.accelerator.wait_for_everyone()

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
    the data. On a GPU, float32 master weights are computed under autocast. Adapters choose their
    dtypes themselves, over a base that computes as it does in scoring. On a CPU, the reader
    itself uses autocast, see `PackReader`.

    Args:
        seed: of the recipe; each rank adds its own number.
        options: device, number of processes, and gradient accumulation of the launch.
        hardware: of this process.
        full: every weight is trained.

    Raises:
        PipelineError: the launch needs a GPU that is missing, or has started another number of
            ranks.
    """
    _check_gpu(options, hardware)
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


def _check_gpu(options: TrainOptions, hardware: Hardware) -> None:
    if options.device == "gpu" and hardware.device == "cpu":
        raise PipelineError(
            f"launch.config is for GPUs, but PyTorch {torch.__version__} finds no GPU on "
            f"{gethostname()}; check that driver and build are for the same CUDA and that "
            "CUDA_VISIBLE_DEVICES names existing GPUs, or use the launch config of the same name "
            "that begins with cpu_"
        )


def prepare(
    accelerator: Accelerator,
    reader: PackReader,
    groups: list[dict[str, Any]],
    *,
    optimizer: Optimizer,
    max_grad_norm: float,
    timer: PhaseTimer,
) -> Engine:
    """Hand a model and its optimizer to accelerate, which shards them as the launch config defines.

    Args:
        accelerator: see `start`.
        reader: of a model that is frozen except for the trained weights.
        groups: what AdamW trains, each with its peak learning rate.
        optimizer: see `pipelines.models.hardware.choose_optimizer`.
        max_grad_norm: gradients are clipped to this norm.
        timer: gets the time in collectives.

    Raises:
        PipelineError: under ZeRO-3, ranks that read one example at a time would gather weights a
            different number of times.
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
    time_gradient_averaging(wrapped, timer)
    return Engine(accelerator, objective, wrapped, prepared, timer)


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
    by_engine = full or is_deepspeed() or hardware.dtype is torch.float16
    if hardware.product_dtype is not None or not by_engine:
        return "no"
    return MIXED_PRECISION[hardware.dtype]


def _process_group(hardware: Hardware, seconds: int) -> InitProcessGroupKwargs:
    """Name the backend, and how long a rank waits for another before it gives up."""
    return InitProcessGroupKwargs(backend=hardware.backend, timeout=timedelta(seconds=seconds))
