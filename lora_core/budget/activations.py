"""What a training step keeps from its forward pass for its backward pass, counted from the shapes of a model's layers.

A block of a decoder is made of parts, each a parent of linear layers: readers that share one input (q, k, v; gate, up)
and, last, a writer into the residual stream (o; down). For each token a part keeps

    D + Σ readers' outputs + W      the shared input, what the readers give, and what the writer reads
        + W                         where something stands between them: attention keeps its result and the copy that o
                                    reads, a gated unit its activated gate and the product that down reads

in the computation's dtype, and each norm its input in float32; a norm that is trained also keeps what it scales. An
adapter adds nothing but the mask of its dropout: `lora_linear` saves its input alone, which readers share.
Attention keeps no table of T × T (FlashAttention, Dao et al. 2022, arXiv 2205.14135). With gradient checkpointing
(Chen et al. 2016, arXiv 1604.06174) a block keeps its input, and one block at a time is computed again.

Shapes: D width of the residual stream, W what a writer reads, V words of the vocabulary.
"""

from collections.abc import Iterator

from torch import nn

from lora_core.base.quant import base_weight
from lora_core.modules import output_head

FLOAT32 = 4
Shape = tuple[int, int]
"""(out, in) of a linear layer."""


def kept_bytes_per_token(model: nn.Module, *, compute_bytes: int, norms_trained: bool) -> int:
    """Return the bytes that all blocks keep for each token; see the module's text."""
    norms = sum(norm_inputs(model)) * (FLOAT32 + (compute_bytes if norms_trained else 0))
    return norms + compute_bytes * sum(_kept_by_part(part) for part in parts(model))


def activation_bytes(model: nn.Module, *, tokens: int, compute_bytes: int, norms_trained: bool, checkpointing: bool) -> int:
    """Return what is kept for the backward pass of `tokens` tokens, and the gradients in flight through one part.

    Args:
        model: a decoder, on the meta device or any other.
        tokens: that one process handles at once.
        compute_bytes: of a number in the computation's dtype.
        norms_trained: full fine-tuning.
        checkpointing: blocks keep their input only.
    """
    kept = kept_bytes_per_token(model, compute_bytes=compute_bytes, norms_trained=norms_trained)
    if checkpointing:
        blocks = block_count(model)
        kept = kept // blocks + compute_bytes * blocks * parts(model)[0][-1][0]
    return tokens * (kept + compute_bytes * max(_in_flight(part) for part in parts(model)))


def loss_bytes(model: nn.Module, *, rows: int, compute_bytes: int) -> int:
    """Return what the output head holds while it forms the loss of `rows` positions at once.

    Logits and their gradient in float32, and a copy of the gradient where the computation is in another dtype.
    """
    head = output_head(model)
    weight = None if head is None else base_weight(head)
    words = 0 if weight is None else weight.shape[0]
    return rows * words * (2 * FLOAT32 + (compute_bytes if compute_bytes < FLOAT32 else 0))


def parts(model: nn.Module) -> list[list[Shape]]:
    """Return the shapes of the linear layers, the output head aside, grouped by the module that holds them."""
    head = output_head(model)
    groups = (_linear_shapes(parent, head) for parent in model.modules())
    return [group for group in groups if group]


def norm_inputs(model: nn.Module) -> Iterator[int]:
    """Yield how many numbers each norm reads for a token: its width, or all heads of the reader that it follows.

    A norm is a module whose only weight is a vector; one inside attention, narrower than the stream, is as wide as a head.
    """
    for parent in model.modules():
        readers = _linear_shapes(parent, None)[:-1]
        for index, width in enumerate(_vectors(parent)):
            follows = index < len(readers) and width < readers[index][1]
            yield readers[index][0] if follows else width


def block_count(model: nn.Module) -> int:
    """Return how many blocks there are: the length of the longest list of modules."""
    return max((len(module) for module in model.modules() if isinstance(module, nn.ModuleList)), default=1)


def _linear_shapes(parent: nn.Module, head: nn.Module | None) -> list[Shape]:
    weights = (base_weight(child) for child in parent.children() if child is not head)
    return [weight.shape for weight in weights if weight is not None]


def _vectors(parent: nn.Module) -> list[int]:
    weights = (getattr(child, "weight", None) for child in parent.children())
    return [weight.numel() for weight in weights if weight is not None and weight.dim() == 1]


def _kept_by_part(part: list[Shape]) -> int:
    *readers, (_, written_from) = part
    given = sum(out for out, _ in readers)
    shared = readers[0][1] if readers else 0
    between = written_from if readers and given != written_from else 0
    return shared + given + written_from + between


def _in_flight(part: list[Shape]) -> int:
    """Gradients of what the writer reads and of what the readers give, which a part's backward pass holds at once."""
    *readers, (_, written_from) = part
    return written_from + sum(out for out, _ in readers)
