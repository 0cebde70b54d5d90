"""What the machine can do decides device, dtype, backend, attention and optimiser: here, and nowhere else."""

import os
import resource
from dataclasses import dataclass

import torch

from pipelines.child import PLACE


@dataclass(frozen=True)
class Hardware:
    """The choices for one process."""

    device: str
    """Torch device of this process, such as cpu or cuda:1."""
    dtype: torch.dtype
    """Dtype of the computation."""
    backend: str
    """Collective library of torch.distributed."""
    fused_optimizer: bool
    """Use AdamW's fused kernel."""

    @property
    def name(self) -> str:
        """Return what computes, as a report names it."""
        return torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "CPU"

    def describe(self) -> str:
        """Return one line for the start of a log."""
        dtype = str(self.dtype).removeprefix("torch.")
        optimizer = "fused AdamW" if self.fused_optimizer else "AdamW"
        return f"device {self.device}, {dtype}, {self.backend}, {optimizer}, {torch.get_num_threads()} threads"


def detect() -> Hardware:
    """Choose for this process from what is there.

    bfloat16 is chosen where the hardware multiplies it; a CPU without such units is 30 to 60 times slower in it.
    """
    if torch.cuda.is_available():
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        place = os.environ.get("LOCAL_RANK") or os.environ.get(PLACE, "0")  # a rank's, or that of an evaluation beside others
        device = int(place) % torch.cuda.device_count()
        return Hardware(f"cuda:{device}", dtype, "nccl", fused_optimizer=True)
    return Hardware("cpu", torch.float32, "gloo", fused_optimizer=False)


def peak_memory_bytes() -> int:
    """Return this process's peak: GPU memory where there is one, resident memory otherwise."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
