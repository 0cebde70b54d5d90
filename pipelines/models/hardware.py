"""Choose device, dtype, backend, attention kernel and optimizer from what the machine can do.

No other module makes these choices.
"""

import os
import resource
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from pipelines.config.sections import TrainingDtype
from pipelines.errors import PipelineError
from pipelines.runtime.child import WORKER_INDEX

AdamState = Literal["whole", "shared", "replaced"]
"""What an engine does with Adam's state.

Each rank has all of it, or a shard (ZeRO), or DeepSpeed's own Adam replaces the given optimizer,
for example if the launch offloads and does not set zero_force_ds_cpu_optimizer."""
FUSED, PAGED, REPLACED = "fused AdamW", "paged 8-bit AdamW", "DeepSpeed's AdamW"
"""Names of the optimizers, for logs and results."""
COMFORTABLE = 0.9
"""Largest fraction of GPU memory that a training may be estimated to need.

The rest is for what an allocator cannot use."""
GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """The choices for one process."""

    device: str
    """Torch device of this process, such as cpu or cuda:1."""
    dtype: torch.dtype
    """Dtype of products with weights; on a GPU also of all else."""
    backend: str
    """Collective library of torch.distributed."""
    gpu_bytes: int = 0
    """Total memory of the GPU, 0 for a CPU. Free memory would make the choices vary on one card."""

    @property
    def name(self) -> str:
        """The name of the device in reports."""
        return torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "CPU"

    @property
    def states(self) -> torch.dtype:
        """Dtype of weights that are not quantized, of norms, attention and loss.

        On a CPU only products with weights gain from 16 bits.
        """
        return torch.float32 if self.device == "cpu" else self.dtype

    @property
    def product_dtype(self) -> torch.dtype | None:
        """Dtype of products if it is not that of the states, so that autocast chooses it."""
        return None if self.dtype is self.states else self.dtype

    @property
    def dtype_name(self) -> str:
        """The name of the dtype in reports."""
        return str(self.dtype).removeprefix("torch.")

    def describe(self, attention: str, optimizer: "Optimizer") -> str:
        """Return one line for the start of a log.

        Args:
            attention: name of the kernel that reads packs.
            optimizer: which one was chosen, and why.
        """
        parts = [
            f"device {self.device}",
            self.dtype_name,
            self.backend,
            f"{attention} attention",
            f"{optimizer.name} ({optimizer.reason})",
            f"{torch.get_num_threads()} threads",
        ]
        return ", ".join(parts)


class AttentionShape(NamedTuple):
    """The attention heads of a layer."""

    heads: int
    """Query heads."""
    key_heads: int
    """Key and value heads; fewer if query heads share them."""
    size: int
    """Width of one head."""


@dataclass(frozen=True)
class Optimizer:
    """An AdamW, and why this one."""

    name: str
    reason: str


def detect() -> Hardware:
    """Choose for this process from the available hardware.

    bfloat16 is chosen if a GPU multiplies it. A CPU without such units is 30 to 60 times slower in
    it.
    """
    if not torch.cuda.is_available():
        return Hardware("cpu", torch.float32, "gloo")
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    # the rank of a training process, or the index of one of several evaluation processes
    index = os.environ.get("LOCAL_RANK") or os.environ.get(WORKER_INDEX, "0")
    device = int(index) % torch.cuda.device_count()
    memory = torch.cuda.get_device_properties(device).total_memory
    return Hardware(f"cuda:{device}", dtype, "nccl", memory)


def detect_for_training(dtype: TrainingDtype) -> Hardware:
    """Choose for a process that trains.

    A CPU scores in float32, so that scores are comparable across machines, but it trains in
    bfloat16 if the recipe says so.

    Args:
        dtype: the recipe's choice; `auto` is that of `detect`.

    Raises:
        PipelineError: the GPU has no units for the recipe's dtype.
    """
    hardware = detect()
    if dtype == "auto":
        return hardware
    if dtype == "bfloat16" and hardware.dtype is torch.float16:
        raise PipelineError(
            f"training.dtype is bfloat16, but {hardware.name} has no units for it; remove the key, "
            "and it is trained in float16"
        )
    return replace(hardware, dtype=getattr(torch, dtype))


def choose_optimizer(hardware: Hardware, state: AdamState, full_bytes: int | None) -> Optimizer:
    """Choose the AdamW that trains.

    In 8 bits its state takes a quarter of float32's, and pages of it move to the host when the GPU
    is full (Dettmers et al. 2022, arXiv 2110.02861, and 2023, arXiv 2305.14314). That rounds, so it
    is used only if nothing else would fit.

    Args:
        hardware: this process's.
        state: what the engine does with Adam's state.
        full_bytes: estimated bytes on this device of full fine-tuning with the fused AdamW; None
            for an adapter.
    """
    if state == "replaced":
        return Optimizer(REPLACED, "the launch offloads it, and does not keep PyTorch's")
    if not hardware.gpu_bytes:
        return Optimizer(FUSED, "on a CPU")
    if state == "shared":
        return Optimizer(FUSED, "ZeRO shards its state")
    if full_bytes is None:
        return Optimizer(FUSED, "an adapter's state is small")
    needed = f"{full_bytes / GIB:.1f} of {hardware.gpu_bytes / GIB:.1f} GiB"
    fits = full_bytes <= COMFORTABLE * hardware.gpu_bytes
    return Optimizer(FUSED if fits else PAGED, f"full fine-tuning needs about {needed}")


def attention_kernel(hardware: Hardware, shape: AttentionShape | None) -> str:
    """Return the kernel by which PyTorch computes causal attention here.

    It is flash if device, dtype and heads allow it.

    Args:
        hardware: this process's.
        shape: of the attention heads; None for a model without heads.
    """
    if shape is None:
        return "no"
    empty = partial(torch.empty, dtype=hardware.states, device=hardware.device)
    query = empty(1, shape.heads, 2, shape.size)
    key = empty(1, shape.key_heads, 2, shape.size)
    is_shared = shape.heads != shape.key_heads
    choice = torch._fused_sdp_choice(
        query.requires_grad_(), key, key, is_causal=True, enable_gqa=is_shared
    )
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


def reset_peak_memory() -> None:
    """Reset the peak of GPU memory; the resident peak of a process cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Return this process's peak: GPU memory if there is a GPU, resident memory otherwise."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
