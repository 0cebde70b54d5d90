"""Which weights of a model are transferred between ranks, from shapes only.

`lora_core.budget.wire` computes how often they are transferred.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lora_core.base.quant import base_weight
from lora_core.budget.activations import FLOAT32
from lora_core.budget.parts import blocks
from lora_core.budget.setup import Setup
from lora_core.budget.wire import PERSISTENT_WEIGHTS, CommunicatedWeights
from lora_core.modules import output_head
from lora_core.targets import Target

CODES_PER_BYTE = 2
"""bitsandbytes packs two 4-bit codes into one uint8, which is one number for ZeRO-3."""


@dataclass(frozen=True)
class _StoredParameter:
    """A parameter as an engine stores it."""

    numbers: int
    """Elements of the tensor: one byte of 4-bit codes is one element."""
    number_bytes: int
    """Bytes per element."""
    in_block: bool
    """It belongs to a block, which checkpointing recomputes."""
    trained: bool

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.numbers * self.number_bytes


def communicated_weights(
    model: nn.Module,
    setup: Setup,
    targets: Sequence[Target] = (),
    *,
    persistent_weights: int = PERSISTENT_WEIGHTS,
) -> CommunicatedWeights:
    """Return the weights that the collectives of a training run transfer.

    Args:
        model: without adapters, on the meta device or any other.
        setup: how it is trained.
        targets: the adapters, from `plan_targets`; ignored for full fine-tuning.
        persistent_weights: ZeRO-3 keeps a parameter of at most this many numbers gathered.
    """
    full = setup.method == "full"
    stored = list(_base_parameters(model, setup))
    if not full:
        stored += _adapter_parameters(model, setup, targets)
    sharded = [parameter for parameter in stored if parameter.numbers > persistent_weights]
    of_blocks = [parameter for parameter in sharded if parameter.in_block]
    of_training = [parameter for parameter in stored if parameter.trained]
    sharded_bytes = _total_bytes(sharded)
    trained = _total_numbers(of_training)
    plain_bytes_per_weight = setup.compute_bytes if full and not setup.masters else FLOAT32
    return CommunicatedWeights(
        plain_bytes=trained * plain_bytes_per_weight,
        trained_bytes=trained * setup.compute_bytes,
        first_bytes=sharded_bytes,
        again_bytes=sharded_bytes + _extra_embedding_bytes(model, setup, persistent_weights),
        block_bytes=_total_bytes(of_blocks),
        persistent_bytes=_total_bytes(stored) - sharded_bytes,
        shared_numbers=_total_numbers(sharded),
    )


def _total_bytes(parameters: Iterable[_StoredParameter]) -> int:
    return sum(parameter.size for parameter in parameters)


def _total_numbers(parameters: Iterable[_StoredParameter]) -> int:
    return sum(parameter.numbers for parameter in parameters)


def _base_parameters(model: nn.Module, setup: Setup) -> Iterator[_StoredParameter]:
    """Yield the parameters of the base; with qlora, those of linear layers as 4-bit codes."""
    quantized = _ids_of_quantized(model) if setup.method == "qlora" else set()
    in_blocks: set[int] = set()
    for block in blocks(model):
        in_blocks.update(map(id, block.parameters()))
    for parameter in model.parameters():
        numbers = parameter.numel()
        number_bytes = setup.compute_bytes
        if id(parameter) in quantized:
            numbers = -(-numbers // CODES_PER_BYTE)  # rounded up
            number_bytes = 1
        yield _StoredParameter(
            numbers=numbers,
            number_bytes=number_bytes,
            in_block=id(parameter) in in_blocks,
            trained=setup.method == "full",
        )


def _ids_of_quantized(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that qlora quantizes: linear layers except the head."""
    head = output_head(model)
    found = set()
    for module in model.modules():
        weight = None if module is head else base_weight(module)
        if weight is not None:
            found.add(id(weight.stored))
    return found


def _adapter_parameters(
    model: nn.Module,
    setup: Setup,
    targets: Sequence[Target],
) -> Iterator[_StoredParameter]:
    """Yield A and B of each target and, under DoRA, the norms of its rows."""
    prefixes = _prefixes_of_blocks(model)
    for target in targets:
        sizes = [
            target.experts * target.rank * target.in_features,
            target.experts * target.rank * target.out_features,
        ]
        if setup.dora:
            sizes.append(target.out_features)
        in_block = target.name.startswith(prefixes)
        for numbers in sizes:
            yield _StoredParameter(
                numbers=numbers,
                number_bytes=setup.compute_bytes,
                in_block=in_block,
                trained=True,
            )


def _prefixes_of_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the beginnings of the paths of all modules in blocks."""
    model_blocks = set(blocks(model))
    prefixes = []
    for name, module in model.named_modules():
        if module in model_blocks:
            prefixes.append(f"{name}.")
    return tuple(prefixes)


def _extra_embedding_bytes(model: nn.Module, setup: Setup, persistent_weights: int) -> int:
    """Return the bytes of the repeated uses of the embedding table, minus those of one use.

    The backward pass reads a trained table but not a frozen one. The head reads a tied table as
    well, in both passes.
    """
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    head = output_head(model)
    if table.numel() <= persistent_weights:
        return 0
    is_tied = head is not None and getattr(head, "weight", None) is table
    repeated_uses = 2 * is_tied + (setup.method == "full")
    return int(table.numel()) * setup.compute_bytes * (repeated_uses - 1)
