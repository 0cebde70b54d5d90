"""Bytes that each rank sends in one optimizer step with ring collectives. Imports no torch.

With a ring of n ranks and a tensor of S bytes, each rank sends (n−1)/n S for an all-gather or a
reduce-scatter, and twice that for an all-reduce (Patarasuk and Yuan 2009, doi
10.1016/j.jpdc.2008.09.002). In these units, Rajbhandari et al. 2020 (arXiv 1910.02054, section 7)
count 2 P for data parallelism, ZeRO-1 and ZeRO-2, and 3 P for ZeRO-3, with P trained weights.
DeepSpeed 0.19 differs from the paper in four points, each of which was measured:

    ZeRO-1, 2   all-reduce the gradient instead of reducing it to its owner, unless
                use_multi_rank_bucket_allreduce is false: 3 P
    ZeRO-2, 3   reduce the gradient of every micro-batch; DDP and ZeRO-1 only after the last one
    ZeRO-3      gathers frozen weights too: with an adapter, they are nearly all of the traffic
    ZeRO-3      keeps small weights gathered for a step, and other weights from one use to the next
                if these are close enough

4-bit codes are gathered as codes. With gradient checkpointing, blocks are gathered once more for
the recomputation (Rajbhandari et al. 2021, arXiv 2104.07857, section 4). Not counted: single
numbers, such as losses and norms, and the setup in a first step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Sharding = Literal["ddp", "zero1", "zero2", "zero3", "zero3_offload"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)
PERSISTENT_WEIGHTS = 100_000
"""DeepSpeed's default of stage3_param_persistence_threshold."""
REUSE_WEIGHTS = 1_000_000_000
"""DeepSpeed's default of stage3_max_reuse_distance."""
RING = {
    "all_reduce": 2,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
}
"""Collective → how many times a rank sends (n−1)/n of the complete tensor."""


@dataclass(frozen=True)
class CommunicatedWeights:
    """The weights that collectives transfer: bytes of complete tensors, as stored."""

    plain_bytes: int
    """All trained weights, and their gradients, without an engine: adapters are float32."""
    trained_bytes: int
    """The same with an engine, in the computation's dtype."""
    first_bytes: int
    """ZeRO-3: every weight that is sharded and released after use, counted once."""
    again_bytes: int
    """ZeRO-3: of these, the weights that are used again, in the backward pass or in a tied head."""
    block_bytes: int
    """ZeRO-3: of these, the weights of blocks."""
    persistent_bytes: int
    """ZeRO-3: every weight that is small enough to stay gathered for a step."""
    shared_numbers: int
    """ZeRO-3: the stored numbers that first_bytes counts."""


@dataclass(frozen=True)
class Exchange:
    """How ranks divide the work of a step."""

    sharding: Sharding
    processes: int
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step and process."""
    checkpointing: bool = False
    """Gradient checkpointing."""
    reduces_to_owner: bool = False
    """ZeRO-1 and 2: each shard of the gradient is reduced to its owner only, as in the paper."""
    reuse_weights: int = REUSE_WEIGHTS
    """ZeRO-3: a weight stays gathered if it is used again within this many other numbers."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in one optimizer step."""

    gradient_bytes: int
    """To reduce gradients."""
    update_bytes: int
    """To gather the updated weights, if the optimizer state is sharded."""
    gather_bytes: int
    """ZeRO-3: to gather weights for forward and backward passes."""
    host_bytes: int = 0
    """Between a GPU and its host if the optimizer is offloaded, a lower bound.

    Not on the wire. Source: Ren et al. 2021, arXiv 2101.06840.
    """

    @property
    def wire_bytes(self) -> int:
        """The total that is sent to other ranks."""
        return self.gradient_bytes + self.update_bytes + self.gather_bytes


def wire_bytes(weights: CommunicatedWeights, exchange: Exchange) -> Traffic:
    """Return what each rank sends in a step; all zero for one rank.

    Args:
        weights: what collectives transfer, from `communicated_weights`.
        exchange: how often and between how many ranks.
    """
    if exchange.sharding == "ddp":
        reduced = ring_bytes({"all_reduce": weights.plain_bytes}, exchange.processes)
        return Traffic(gradient_bytes=reduced, update_bytes=0, gather_bytes=0)
    trained = ring_bytes({"all_gather": weights.trained_bytes}, exchange.processes)
    reductions = 1 if exchange.sharding == "zero1" else exchange.gradient_accumulation_steps
    if exchange.sharding in ("zero1", "zero2"):
        passes = 1 if exchange.reduces_to_owner else 2
        return Traffic(
            gradient_bytes=passes * reductions * trained,
            update_bytes=trained,
            gather_bytes=0,
        )
    return _zero3_traffic(weights, exchange, gradient_bytes=reductions * trained)


def _zero3_traffic(
    weights: CommunicatedWeights,
    exchange: Exchange,
    *,
    gradient_bytes: int,
) -> Traffic:
    """Return what each rank sends under ZeRO-3, which gathers the weights of each micro-batch."""
    processes = exchange.processes
    micro_batches = exchange.gradient_accumulation_steps
    gathered = micro_batches * gathered_bytes(weights, exchange)
    host_bytes = 0
    if exchange.sharding == "zero3_offload":
        host_bytes = (micro_batches + 1) * weights.trained_bytes // processes
    return Traffic(
        gradient_bytes=gradient_bytes,
        update_bytes=ring_bytes({"all_gather": weights.persistent_bytes}, processes),
        gather_bytes=ring_bytes({"all_gather": gathered}, processes),
        host_bytes=host_bytes,
    )


def gathered_bytes(weights: CommunicatedWeights, exchange: Exchange) -> int:
    """Return what ZeRO-3 gathers for one micro-batch, in bytes of complete tensors.

    Of the weights that are used again, those at the end of the forward pass are used soonest: if R
    numbers follow a weight, it is used again after 2 R, or after 3 R if blocks are recomputed.

    Args:
        weights: what collectives transfer.
        exchange: whether blocks are recomputed, and how long weights stay gathered.
    """
    passes = 3 if exchange.checkpointing else 2
    kept_fraction = 1.0
    if weights.shared_numbers:
        furthest_reuse = passes * weights.shared_numbers
        kept_fraction = min(1.0, exchange.reuse_weights / furthest_reuse)
    gathered_again = int((1 - kept_fraction) * weights.again_bytes)
    recomputed = weights.block_bytes if exchange.checkpointing else 0
    return weights.first_bytes + gathered_again + recomputed


def ring_bytes(sizes: Mapping[str, int], processes: int) -> int:
    """Return the bytes that each rank sends with ring collectives.

    Args:
        sizes: name of a collective of torch.distributed → bytes of its complete tensors.
        processes: number of ranks.
    """
    total = 0
    for name, size in sizes.items():
        total += RING[name] * size * (processes - 1) // processes
    return total


def seconds_on_wire(sent_bytes: int, gbit: float) -> float:
    """Return the time to send, without overlap with other work.

    Args:
        sent_bytes: that one rank sends.
        gbit: bandwidth in 10⁹ bits per second.
    """
    bits_per_second = gbit * 1e9
    return 8 * sent_bytes / bits_per_second
