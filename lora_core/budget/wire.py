"""What each rank sends to the others in one optimiser step, as ring algorithms move it. Pure, and imports no torch.

A ring of n ranks passes n−1 of n parts on: of a tensor of S bytes each rank sends (n−1)/n S to gather it or to reduce it to
shares, and twice that to reduce it everywhere (Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002). In these units,
Rajbhandari et al. 2020 (arXiv 1910.02054, section 7) count 2 P for data parallelism and ZeRO-1 and 2, and 3 P for ZeRO-3,
where P weights are trained. What DeepSpeed 0.19 does departs from the paper in four places, each of which was counted:

    ZeRO-1, 2   reduce the gradient everywhere and not to its owner, unless use_multi_rank_bucket_allreduce is false: 3 P
    ZeRO-2, 3   reduce the gradient of every micro-batches; DDP and ZeRO-1 once, with the last
    ZeRO-3      gathers frozen weights too: for an adapter they are nearly all, and the gradient is next to nothing
    ZeRO-3      keeps small weights whole for a step, and others from one use to the next where that is near enough

Codes of 4 bits are gathered as codes. With gradient checkpointing blocks are gathered once more, to be computed again (Rajbhandari
et al. 2021, arXiv 2104.07857, section 4). Left out: single numbers, such as losses and norms, and what happens in a first step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Sharding = Literal["ddp", "zero1", "zero2", "zero3", "zero3_offload"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)
PERSISTENT_WEIGHTS = 100_000
"""DeepSpeed's stage3_param_persistence_threshold where its config does not say."""
REUSE_WEIGHTS = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance where its config does not say."""
RING = {
    "all_reduce": 2,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
}
"""Collective → how often a rank sends (n−1)/n of the whole tensor."""


@dataclass(frozen=True)
class Moved:
    """The weights of a training as collectives see them: bytes as they are stored, whole."""

    plain_bytes: int
    """Of all trained weights, and of their gradients, where no engine holds them: adapters are float32."""
    trained_bytes: int
    """The same under an engine, in the computation's dtype."""
    first_bytes: int
    """ZeRO-3: every weight that it shares out and lets go of, once."""
    again_bytes: int
    """ZeRO-3: of these, what one part needs again after its first use, in its backward pass or in the head that is tied."""
    block_bytes: int
    """ZeRO-3: of these, the blocks'."""
    persistent_bytes: int
    """ZeRO-3: every weight that is small enough to stay whole for a step."""
    shared_numbers: int
    """ZeRO-3: stored numbers behind first_bytes."""


@dataclass(frozen=True)
class Exchange:
    """How ranks share the work of a step."""

    sharding: Sharding
    processes: int
    gradient_accumulation_steps: int = 1
    """Parts in which each rank takes its share of a step."""
    checkpointing: bool = False
    """Gradient checkpointing."""
    reduces_to_owner: bool = False
    """ZeRO-1 and 2: each share of the gradient goes to its owner alone, as in the paper."""
    reuse_weights: int = REUSE_WEIGHTS
    """ZeRO-3: a weight stays gathered that is used again before so many other numbers are."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in one optimiser step."""

    gradient_bytes: int
    """To reduce gradients."""
    update_bytes: int
    """To gather what the optimiser changed, where each rank holds a share of its state."""
    gather_bytes: int
    """ZeRO-3: to gather weights for forward and backward passes."""
    host_bytes: int = 0
    """Not on the wire: between a GPU and its host, where the optimiser lies there (Ren et al. 2021, arXiv 2101.06840), at least."""

    @property
    def wire_bytes(self) -> int:
        """The sum of what goes to other ranks."""
        return self.gradient_bytes + self.update_bytes + self.gather_bytes


def wire_bytes(moved: Moved, exchange: Exchange) -> Traffic:
    """Return what each rank sends in a step; nothing where there is one rank."""
    if exchange.sharding == "ddp":
        return Traffic(ring_bytes({"all_reduce": moved.plain_bytes}, exchange.processes), 0, 0)
    once = ring_bytes({"all_gather": moved.trained_bytes}, exchange.processes)
    parts = 1 if exchange.sharding == "zero1" else exchange.gradient_accumulation_steps
    if exchange.sharding in ("zero1", "zero2"):
        return Traffic((1 if exchange.reduces_to_owner else 2) * parts * once, once, 0)
    gathered = ring_bytes(
        {"all_gather": parts * gathered_bytes(moved, exchange)}, exchange.processes
    )
    kept = ring_bytes({"all_gather": moved.persistent_bytes}, exchange.processes)
    host = (
        (parts + 1) * moved.trained_bytes // exchange.processes
        if exchange.sharding == "zero3_offload"
        else 0
    )
    return Traffic(parts * once, kept, gathered, host)


def gathered_bytes(moved: Moved, exchange: Exchange) -> int:
    """Return what ZeRO-3 makes whole for one micro-batches, in bytes of whole tensors.

    Of the weights that are needed again, those at the end of the forward pass are needed soonest: with R numbers after it, a
    weight is back after 2 R, and after 3 R where blocks are computed twice.
    """
    passes = 3 if exchange.checkpointing else 2
    kept = (
        min(1.0, exchange.reuse_weights / (passes * moved.shared_numbers))
        if moved.shared_numbers
        else 1.0
    )
    recomputed = moved.block_bytes if exchange.checkpointing else 0
    return moved.first_bytes + int((1 - kept) * moved.again_bytes) + recomputed


def ring_bytes(whole: Mapping[str, int], processes: int) -> int:
    """Return what each rank sends for collectives over whole tensors, as a ring moves them.

    Args:
        whole: name of a collective of torch.distributed → bytes of the whole tensors that pass it.
        processes: ranks.
    """
    return sum(RING[name] * size * (processes - 1) // processes for name, size in whole.items())


def seconds_on_wire(sent_bytes: int, gbit: float) -> float:
    """Return how long a rank sends at `gbit` (10⁹ bits a second), while nothing else is done."""
    return 8 * sent_bytes / (gbit * 1e9)
