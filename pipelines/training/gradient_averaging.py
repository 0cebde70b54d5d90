"""Time DDP's reduction of gradients on CPUs by the hook that DDP offers for this."""

from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from pipelines.runtime.heartbeats import COMMUNICATION
from pipelines.training.phase_timer import PhaseTimer


def time_gradient_averaging(wrapped: Any, timer: PhaseTimer) -> None:
    """Let DDP average gradients inside the phase `communication`, if it trains on CPUs.

    DDP calls its communication hook instead of its own reduction, which runs in C++. On a GPU the
    reduction overlaps with the backward pass, so there it stays DDP's and is not timed separately.

    Args:
        wrapped: what the engine trains; unchanged unless it is DDP on CPUs.
        timer: gets the phase.
    """
    if isinstance(wrapped, DistributedDataParallel) and wrapped.device_type == "cpu":
        wrapped.register_comm_hook(timer, average_gradients)


def average_gradients(timer: PhaseTimer, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Return the gradients of a bucket, averaged over all ranks, as DDP does without a hook.

    A collective. It waits for the result: on a CPU there is no computation that could overlap it.
    """
    with timer.phase(COMMUNICATION):
        gradient = bucket.buffer().div_(torch.distributed.get_world_size())
        torch.distributed.all_reduce(gradient)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(gradient)
    return done
