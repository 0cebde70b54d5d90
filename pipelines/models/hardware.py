"""What the machine can do decides device, dtype, backend, attention kernel and optimiser: here, and nowhere else."""

import os
import resource
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.attention import SDPBackend

from pipelines.runtime.child import PLACE

AdamState = Literal["whole", "shared", "replaced"]
"""What an engine does with Adam's state: each rank has all of it, or a share (ZeRO), or DeepSpeed's own Adam takes the
place of what was given, as where the launch offloads and says nothing of zero_force_ds_cpu_optimizer."""
PLAIN, FUSED, PAGED, REPLACED = "AdamW", "fused AdamW", "paged 8-bit AdamW", "DeepSpeed's AdamW"
"""Names of what trains, for logs and results."""
COMFORTABLE = 0.9
"""The share of a GPU's memory that a training may be estimated to need; the rest is for what an allocator cannot use."""
GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """The choices for one process."""

    device: str
    """Torch device of this process, such as cpu or cuda:1."""
    dtype: torch.dtype
    """Dtype of the computation."""
    backend: str
    """Collective library of torch.distributed."""
    gpu_bytes: int = 0
    """Memory of the GPU, whoever holds how much of it: the same card chooses the same each time. 0 for a CPU."""

    @property
    def name(self) -> str:
        """Return what computes, as a report names it."""
        return torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "CPU"

    def describe(self, attention: str, optimizer: "Optimizer") -> str:
        """Return one line for the start of a log."""
        dtype = str(self.dtype).removeprefix("torch.")
        chosen = f"device {self.device}, {dtype}, {self.backend}, {attention} attention, {optimizer.name} ({optimizer.reason})"
        return f"{chosen}, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Optimizer:
    """An AdamW, and why this one."""

    name: str
    reason: str


def detect() -> Hardware:
    """Choose for this process from what is there.

    bfloat16 is chosen where the hardware multiplies it; a CPU without such units is 30 to 60 times slower in it.
    """
    if torch.cuda.is_available():
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        place = os.environ.get("LOCAL_RANK") or os.environ.get(
            PLACE, "0"
        )  # a rank's, or that of an evaluation beside others
        device = int(place) % torch.cuda.device_count()
        return Hardware(
            f"cuda:{device}", dtype, "nccl", torch.cuda.get_device_properties(device).total_memory
        )
    return Hardware("cpu", torch.float32, "gloo")


def choose_optimizer(hardware: Hardware, state: AdamState, full_bytes: int | None) -> Optimizer:
    """Choose the AdamW that trains.

    In 8 bits its state takes a quarter of float32's, and pages of it go to the host when the GPU is full (Dettmers et al.
    2022, arXiv 2110.02861, and 2023, arXiv 2305.14314). That rounds, so it is taken only where nothing else would fit.

    Args:
        hardware: this process's.
        state: what the engine does with Adam's state.
        full_bytes: what full fine-tuning with the plain AdamW is estimated to need of this device; None for an adapter.
    """
    if state == "replaced":
        return Optimizer(REPLACED, "the launch offloads it, and does not keep PyTorch's")
    if not hardware.gpu_bytes:
        return Optimizer(PLAIN, "on a CPU")
    if state == "shared":
        return Optimizer(FUSED, "ZeRO shares out its state")
    if full_bytes is None:
        return Optimizer(FUSED, "an adapter's state is small")
    needs = (
        f"full fine-tuning needs about {full_bytes / GIB:.1f} of {hardware.gpu_bytes / GIB:.1f} GiB"
    )
    return Optimizer(FUSED if full_bytes <= COMFORTABLE * hardware.gpu_bytes else PAGED, needs)


def attention_kernel(hardware: Hardware, shape: tuple[int, int, int] | None) -> str:
    """Return the kernel by which PyTorch computes causal attention here: flash where device, dtype and heads allow it.

    Args:
        hardware: this process's.
        shape: heads of the queries, heads of keys and values (fewer are shared), width of a head; None for a model without.
    """
    if shape is None:
        return "no"
    heads, key_heads, width = shape
    query, key = (
        torch.empty(1, count, 2, width, dtype=hardware.dtype, device=hardware.device)
        for count in (heads, key_heads)
    )
    choice = torch._fused_sdp_choice(
        query.requires_grad_(), key, key, is_causal=True, enable_gqa=heads != key_heads
    )
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


def reset_peak_memory() -> None:
    """Begin anew to look for a GPU's peak; a process's resident peak is the system's and stays."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Return this process's peak: GPU memory where there is one, resident memory otherwise."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
