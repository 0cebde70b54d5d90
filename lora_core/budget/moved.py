"""What of a model's weights moves between ranks, counted from shapes; see `lora_core.budget.wire` for how often."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lora_core.base.quant import base_weight
from lora_core.budget.activations import FLOAT32
from lora_core.budget.parts import blocks
from lora_core.budget.setup import Setup
from lora_core.budget.wire import PERSISTENT_WEIGHTS, Moved
from lora_core.modules import output_head
from lora_core.targets import Target

CODES_A_BYTE = 2
"""bitsandbytes packs two 4-bit codes into one uint8, which is the number that ZeRO-3 sees."""


@dataclass(frozen=True)
class _Stored:
    """A parameter as an engine would hold it."""

    numbers: int
    """Elements of the tensor: a byte of codes is one."""
    number_bytes: int
    in_block: bool
    trained: bool

    @property
    def size(self) -> int:
        return self.numbers * self.number_bytes


def moved(
    model: nn.Module,
    setup: Setup,
    targets: Sequence[Target] = (),
    *,
    persistent_weights: int = PERSISTENT_WEIGHTS,
) -> Moved:
    """Return what the collectives of a training move.

    Args:
        model: without adapters, on the meta device or any other.
        setup: how it is trained.
        targets: the adapters, from `plan_targets`; of no effect on full fine-tuning.
        persistent_weights: ZeRO-3 keeps a parameter of no more numbers whole.
    """
    full = setup.method == "full"
    stored = [*_base(model, setup), *([] if full else _adapters(model, setup, targets))]
    shared = [one for one in stored if one.numbers > persistent_weights]
    first = sum(one.size for one in shared)
    trained = sum(one.numbers for one in stored if one.trained)
    return Moved(
        plain_bytes=trained * (setup.compute_bytes if full and not setup.masters else FLOAT32),
        trained_bytes=trained * setup.compute_bytes,
        first_bytes=first,
        again_bytes=first + _embedding_again(model, setup, persistent_weights),
        block_bytes=sum(one.size for one in shared if one.in_block),
        persistent_bytes=sum(one.size for one in stored) - first,
        shared_numbers=sum(one.numbers for one in shared),
    )


def _base(model: nn.Module, setup: Setup) -> Iterator[_Stored]:
    head, full = output_head(model), setup.method == "full"
    matrices = (
        (base_weight(module) for module in model.modules() if module is not head)
        if setup.method == "qlora"
        else ()
    )
    coded = {id(matrix.stored) for matrix in matrices if matrix is not None}
    inside = {id(parameter) for block in blocks(model) for parameter in block.parameters()}
    for parameter in model.parameters():
        numbers, in_block = parameter.numel(), id(parameter) in inside
        if id(parameter) in coded:
            yield _Stored(-(-numbers // CODES_A_BYTE), 1, in_block, full)
        else:
            yield _Stored(numbers, setup.compute_bytes, in_block, full)


def _adapters(model: nn.Module, setup: Setup, targets: Sequence[Target]) -> Iterator[_Stored]:
    in_blocks = {id(block) for block in blocks(model)}
    prefixes = tuple(
        f"{name}." for name, module in model.named_modules() if id(module) in in_blocks
    )
    for target in targets:
        in_block = target.name.startswith(prefixes)
        for width in (target.in_features, target.out_features):
            yield _Stored(target.experts * target.rank * width, setup.compute_bytes, in_block, True)
        if setup.dora:
            yield _Stored(target.out_features, setup.compute_bytes, in_block, True)


def _embedding_again(model: nn.Module, setup: Setup, persistent_weights: int) -> int:
    """Return by how many bytes the second uses of the embedding's table differ from one.

    A frozen table is not read in the backward pass, a trained one is; a tied one is read by the head as well, in both passes.
    """
    embedding, head = model.get_input_embeddings(), output_head(model)  # type: ignore[operator]
    table = embedding.weight
    if table.numel() <= persistent_weights:
        return 0
    tied = head is not None and getattr(head, "weight", None) is table
    return int(table.numel()) * setup.compute_bytes * (2 * tied + (setup.method == "full") - 1)
