"""Setup: how and on what a model is trained, as far as memory is concerned. See `lora_core.budget.budget`."""

from dataclasses import dataclass
from typing import Literal, get_args

from lora_core.budget.activations import FLOAT32
from lora_core.budget.wire import SHARDINGS, Sharding
from lora_core.errors import ConfigError
from lora_core.training.losses import CHUNK_ROWS

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = get_args(Method)
EIGHT_BIT_BYTES = 1 + 4 / 256
"""A code of eight bits, and a float32 for each 256 of them (Dettmers et al. 2022, arXiv 2110.02861)."""


@dataclass(frozen=True)
class Setup:
    """How and on what a model is trained.

    Raises:
        ConfigError: a value breaks the rule that stands beside its field.
    """

    method: Method
    """full: every weight; lora: adapters over a base in the computation's dtype; qlora: over a base in NF4."""
    tokens: int
    """That one process handles at once: its part of a step, at least 1."""
    sharding: Sharding = "ddp"
    """What processes share: nothing; the optimiser's states; the gradients too; all weights too; and these with the optimiser and
    its gradients on the host."""
    processes: int = 1
    """At least 1; one per GPU."""
    compute_bytes: int = 2
    """Of a number in the computation's dtype: 2 (bfloat16, float16) or 4 (float32)."""
    checkpointing: bool = False
    """Gradient checkpointing: blocks keep their input and are computed again."""
    dropout: bool = False
    """Adapters drop some of their input, and keep a mask of it."""
    dora: bool = False
    """Adapters train the length of each row as well, and keep a layer's product before they scale it."""
    logit_rows: int = CHUNK_ROWS
    """Positions whose logits exist at once: a chunk of the loss, or fewer where fewer are supervised."""
    bucket_weights: int = 50_000_000
    """Gradients that DeepSpeed reduces at once, as in infra/deepspeed."""
    fused_optimizer: bool = True
    """AdamW's fused kernel; without it a step forms two more numbers for each weight that it updates at once."""
    masters: bool = False
    """What is fully trained is held in float32, and computed in copies of the computation's dtype, as under autocast; an engine has
    masters of its own, and in float32 there is nothing to copy."""
    eight_bit_optimizer: bool = False
    """AdamW keeps its two moments in 8 bits where it trains every weight without an engine; elsewhere of no effect."""
    heap_slack: float = 1.0
    """Room that the allocator takes for each byte that comes and goes in small pieces, at least 1: 1 where it fills every gap
    and gives everything back, more for a heap that keeps what was freed."""
    mapped_checkpoint: bool = False
    """The dense checkpoint lies in the same memory while a base is quantised, as it does on a CPU."""
    process_bytes: int = 0
    """What the process holds before there is a model: interpreter and libraries on a CPU, the context on a GPU."""

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.sharding not in SHARDINGS:
            raise ConfigError(
                f"{self.method!r} under {self.sharding!r} is unknown; methods are {', '.join(METHODS)}, shardings {', '.join(SHARDINGS)}"
            )
        if self.compute_bytes not in (2, 4):
            raise ConfigError(
                f"compute_bytes is {self.compute_bytes}; give 2 for bfloat16 and float16, 4 for float32"
            )
        for name in ("tokens", "processes", "logit_rows", "bucket_weights", "heap_slack"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def engine(self) -> bool:
        """DeepSpeed's engine trains: it holds trained weights in the computation's dtype beside float32 masters."""
        return self.sharding != "ddp"

    @property
    def shares_weights(self) -> bool:
        """No process holds a weight whole but while it is used."""
        return self.sharding in ("zero3", "zero3_offload")

    @property
    def offloads(self) -> bool:
        """The optimiser works on the host."""
        return self.sharding == "zero3_offload"

    @property
    def held_bytes(self) -> int:
        """In which a trained weight is held; adapters and masters are float32 until an engine casts them."""
        return (
            self.compute_bytes
            if self.engine or (self.method == "full" and not self.masters)
            else FLOAT32
        )

    @property
    def copies(self) -> bool:
        """Autocast makes copies of the weights of linear layers, which last as long as a pass."""
        return self.method == "full" and self.held_bytes > self.compute_bytes

    @property
    def moment_bytes(self) -> float:
        """Of each of Adam's two moments of a weight, without an engine."""
        return (
            EIGHT_BIT_BYTES
            if self.eight_bit_optimizer and self.method == "full"
            else self.held_bytes
        )

    def shares(self, first: Sharding) -> int:
        """Return among how many processes a thing is shared that `first` and the shardings after it share."""
        return self.processes if SHARDINGS.index(self.sharding) >= SHARDINGS.index(first) else 1
