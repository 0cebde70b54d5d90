"""Setup: how a model is trained, as far as it affects memory. See `lora_core.budget.budget`."""

from dataclasses import dataclass
from typing import Literal, get_args

from lora_core.budget.activations import FLOAT32
from lora_core.budget.wire import SHARDINGS, Sharding
from lora_core.errors import ConfigError
from lora_core.training.losses import CHUNK_ROWS

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = get_args(Method)
EIGHT_BIT_BYTES = 1 + 4 / 256
"""An 8-bit code, and a float32 for each 256 codes (Dettmers et al. 2022, arXiv 2110.02861)."""


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as it affects memory.

    Raises:
        ConfigError: a value breaks the rule in the docstring of its field.
    """

    method: Method
    """full: every weight; lora: adapters on a base in the computation's dtype; qlora: NF4 base."""
    tokens: int
    """Number of tokens that one process handles at once: its micro-batch, at least 1."""
    sharding: Sharding = "ddp"
    """What is sharded over the processes.

    ddp: nothing; zero1: the optimizer states; zero2: also the gradients; zero3: also all weights;
    zero3_offload: as zero3, with the optimizer and its gradients on the host.
    """
    processes: int = 1
    """At least 1; one per GPU."""
    compute_bytes: int = 2
    """Bytes per number in the computation's dtype: 2 (bfloat16, float16) or 4 (float32)."""
    checkpointing: bool = False
    """Gradient checkpointing: blocks save only their input and are recomputed."""
    dropout: bool = False
    """Adapters use dropout on their input, and save its mask."""
    dora: bool = False
    """Adapters also train the norm of each row, and save a layer's product before scaling it."""
    logit_rows: int = CHUNK_ROWS
    """Positions whose logits exist at once: a chunk of the loss, or all supervised positions."""
    bucket_weights: int = 50_000_000
    """Gradients that DeepSpeed reduces at once, as in infra/deepspeed."""
    fused_optimizer: bool = True
    """AdamW's fused kernel.

    Without it, a step computes two temporary numbers for each weight that it updates at once.
    """
    masters: bool = False
    """Full fine-tuning keeps float32 weights and computes with copies, as under autocast.

    No effect under an engine, which has separate master weights, and no copies if the computation
    is in float32.
    """
    eight_bit_optimizer: bool = False
    """AdamW stores its two moments in 8 bits: full fine-tuning without an engine only."""
    heap_slack: float = 1.0
    """Bytes that the allocator uses per byte of small, short-lived allocations, at least 1.

    1 if it fills every gap and returns everything, more for a heap that keeps freed memory.
    """
    mapped_checkpoint: bool = False
    """The dense checkpoint is mapped into the same memory during quantization, as on a CPU."""
    process_bytes: int = 0
    """Memory before a model is loaded: interpreter and libraries (CPU), or the context (GPU)."""

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.sharding not in SHARDINGS:
            raise ConfigError(
                f"{self.method!r} under {self.sharding!r} is unknown; methods are "
                f"{', '.join(METHODS)}, shardings {', '.join(SHARDINGS)}"
            )
        if self.compute_bytes not in (2, 4):
            raise ConfigError(
                f"compute_bytes is {self.compute_bytes}; "
                "give 2 for bfloat16 and float16, 4 for float32"
            )
        for name in ("tokens", "processes", "logit_rows", "bucket_weights", "heap_slack"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")

    @property
    def engine(self) -> bool:
        """DeepSpeed trains weights in the computation's dtype, with float32 master weights."""
        return self.sharding != "ddp"

    @property
    def shards_weights(self) -> bool:
        """A process has a complete weight only while it is used."""
        return self.sharding in ("zero3", "zero3_offload")

    @property
    def offloads(self) -> bool:
        """The optimizer runs on the host."""
        return self.sharding == "zero3_offload"

    @property
    def held_bytes(self) -> int:
        """Bytes per trained weight: adapters and masters are float32 without an engine."""
        if self.engine or (self.method == "full" and not self.masters):
            return self.compute_bytes
        return FLOAT32

    @property
    def copies(self) -> bool:
        """Autocast copies the weights of linear layers; a copy lives as long as a pass."""
        return self.method == "full" and self.held_bytes > self.compute_bytes

    @property
    def moment_bytes(self) -> float:
        """Bytes of one of Adam's two moments of a weight, without an engine."""
        if self.eight_bit_optimizer and self.method == "full":
            return EIGHT_BIT_BYTES
        return self.held_bytes

    def shard_count(self, first: Sharding) -> int:
        """Return the number of shards of a tensor that `first` and all later shardings shard.

        Args:
            first: the first of `SHARDINGS` that shards the tensor.
        """
        is_sharded = SHARDINGS.index(self.sharding) >= SHARDINGS.index(first)
        return self.processes if is_sharded else 1
