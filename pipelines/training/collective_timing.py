"""Time what the training loop does not call itself: collectives and DeepSpeed's optimizer step."""

from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from pipelines.training.engine import Engine
from pipelines.training.phase_timer import PhaseTimer

Hook = Callable[[None, GradBucket], torch.futures.Future[torch.Tensor]]


def time_collectives(engine: Engine, timer: PhaseTimer) -> None:
    """Count collectives and DeepSpeed's step as phases.

    DeepSpeed takes its step inside the backward pass. DDP reduces gradients in C++, so on a CPU a
    hook replaces the reduction by one that is timed.
    """
    if engine.zero_stage:
        engine.wrapped.step = timer.timed("optimizer", engine.wrapped.step)
    if torch.distributed.is_initialized():
        timer.watch_collectives()
    is_ddp = isinstance(engine.wrapped, DistributedDataParallel)
    if is_ddp and engine.accelerator.device.type == "cpu":
        engine.wrapped.register_comm_hook(None, averaging_hook(torch.distributed.all_reduce))


def averaging_hook(all_reduce: Callable[..., Any]) -> Hook:
    """Return a hook by which DDP averages gradients; a CPU has no computation to overlap it."""

    def average(_: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        gradient = bucket.buffer().div_(torch.distributed.get_world_size())
        all_reduce(gradient)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(gradient)
        return done

    return average
