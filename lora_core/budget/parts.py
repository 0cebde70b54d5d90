"""The parts of a decoder's blocks, identified by the shapes and names of their modules.

A part reads the residual stream and writes its output into the stream:

    plain     readers that share one input (q, k, v; gate, up) and a final writer (o; down)
    latent    attention with low-rank queries, keys and values: q_a, q_b, kv_a, kv_b, o
              (DeepSeek-V2, arXiv 2405.04434)
    experts   stacks of gated units; each token uses K of them (`lora_core.layers.expert_layout`)

Each part reports how many numbers per token its forward pass saves for the backward pass. For any
other module except norms, embeddings and routers, the shapes do not determine the memory:
`uncounted` names it.

Shapes: D width of the residual stream, I inner width of an expert, K experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lora_core.base.quant import base_weight
from lora_core.layers.expert_layout import STACKS, supports
from lora_core.modules import output_head

Shape = tuple[int, int]
"""(out, in) of a linear layer."""
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "gelu_impl")
"""Attribute names of the activation function in Hugging Face models."""


@dataclass(frozen=True)
class TrainedScope:
    """Which weights of a model are trained, as far as it affects the activations."""

    full: bool = False
    """All weights are trained."""
    stacks: frozenset[str] = frozenset()
    """Stacks of experts that have an adapter."""


@dataclass(frozen=True)
class Activation:
    """What an activation function saves per number, in addition to its result."""

    input: bool
    """It saves its input."""
    others: int
    """Number of intermediate results: some activations are computed in several steps."""


KERNELS = {"eager": 2, "grouped_mm": 1}
"""Implementation of experts in transformers → copies of an expert's output that are saved.

One copy is for the router's weight, another is saved by the loop that sums the outputs.
`batched_mm` is missing, because it saves a copy of the weights per token, too much for training.
"""
SMOOTH = Activation(input=True, others=0)
"""For example SiLU, or GELU in one kernel."""


class BlockPart(Protocol):
    """A part of a block."""

    @property
    def writer(self) -> Shape: ...

    def saved(self, trained: TrainedScope) -> int:
        """Return how many numbers per token are saved."""

    @property
    def in_flight(self) -> int:
        """Gradients per token of the writer's input and the readers' outputs, alive at once."""


@dataclass(frozen=True)
class PlainPart:
    """Readers and a writer."""

    readers: tuple[Shape, ...]
    writer: Shape
    activation: Activation = SMOOTH

    def saved(self, trained: TrainedScope) -> int:
        """Return the shared input, readers' outputs, intermediate results and the writer's input.

        Attention saves its result and the copy that o reads. A gated unit saves its activated gate
        and the product that down reads.
        """
        reader_outputs = self._reader_outputs
        writer_input = self.writer[1]
        if not self.readers:
            return reader_outputs + writer_input
        shared_input = self.readers[0][1]
        intermediate = writer_input if reader_outputs != writer_input else 0
        saved_by_activation = self.activation.others - (not self.activation.input)
        return (
            shared_input
            + reader_outputs
            + writer_input
            + intermediate
            + writer_input * saved_by_activation
        )

    @property
    def in_flight(self) -> int:
        return self.writer[1] + self._reader_outputs

    @property
    def _reader_outputs(self) -> int:
        return sum(out for out, _ in self.readers)


@dataclass(frozen=True)
class LatentAttentionPart:
    """Attention that computes keys and values, and often queries, from low-rank vectors."""

    stream: int
    """D."""
    inner: tuple[Shape, ...]
    """q_b, if there is one, and kv_b: they read the low-rank vectors."""
    query: int
    """Width of all queries; the concatenated keys have the same width."""
    writer: Shape

    def saved(self, trained: TrainedScope) -> int:
        """Return the numbers saved per token.

        These are the shared input, the low-rank vectors, queries, keys, the output of kv_b, the
        result and the copy that o reads.
        """
        low_rank = sum(width for _, width in self.inner)
        inputs = self.stream + low_rank
        queries_and_keys = 2 * self.query
        kv_b_output = self.inner[-1][0]
        results = 2 * self.writer[1]
        return inputs + queries_and_keys + kv_b_output + results

    @property
    def in_flight(self) -> int:
        kv_b_output = self.inner[-1][0]
        return 2 * self.query + kv_b_output + self.writer[1]


@dataclass(frozen=True)
class ExpertsPart:
    """Stacks of gated units."""

    chosen: int
    """K."""
    writer: Shape
    """(D, I) of the stack down_proj."""
    kernel: str
    """The implementation in the base; adapted stacks are computed in a loop, as by `eager`."""
    activation: Activation = SMOOTH

    def saved(self, trained: TrainedScope) -> int:
        """Return, for each expert of a token, gate and up, the activated gate and the output.

        A trained stack also saves its inputs: the token, gathered for each of its experts, or the
        input of down_proj.
        """
        stream, inner = self.writer
        kernel = "eager" if trained.stacks else self.kernel
        outputs = KERNELS[kernel] * stream
        inputs = 0
        for name, width in zip(STACKS, (stream, inner), strict=True):
            if trained.full or name in trained.stacks:
                inputs += width
        intermediate = (3 + self.activation.others) * inner
        return self.chosen * (intermediate + outputs + inputs)

    @property
    def in_flight(self) -> int:
        return self.chosen * 3 * self.writer[1]


@dataclass(frozen=True)
class Norm:
    """A module whose weights are vectors."""

    width: int
    """Numbers that it reads per token."""
    upcast: bool
    """It computes in float32 step by step, as RMSNorm does.

    Otherwise it computes in one kernel, in the dtype of its input.
    """


def linear_shapes(model: nn.Module) -> Iterator[Shape]:
    """Yield the shape of every linear layer except the output head."""
    head = output_head(model)
    for parent in model.modules():
        yield from _linears(parent, head).values()


def parts(model: nn.Module) -> list[BlockPart]:
    """Return the parts of a model or a block in order, without the output head."""
    head = output_head(model)
    found: list[BlockPart] = []
    for module in model.modules():
        found += _projections(module, head)
        found += _experts(module)
    return found


def norms(model: nn.Module) -> Iterator[Norm]:
    """Yield the norms of a model or a block.

    A norm inside attention that is narrower than the input of the reader before it is as wide as
    one head and reads all heads.
    """
    for parent in model.modules():
        readers: list[Shape] = []
        if not hasattr(parent, "kv_b_proj"):
            readers = list(_linears(parent, None).values())[:-1]
        norm_modules = filter(_is_norm, parent.children())
        for index, norm in enumerate(norm_modules):
            width = next(norm.parameters()).numel()
            if index < len(readers) and width < readers[index][1]:
                width = readers[index][0]
            yield Norm(width, upcast=not isinstance(norm, nn.LayerNorm))


def routers(model: nn.Module) -> Iterator[Shape]:
    """Yield the shapes (number of experts, D) of the routers that are not linear layers."""
    for parent in model.modules():
        if not _has_experts(parent):
            continue
        for child in parent.children():
            if _is_router(child) and isinstance(child.weight, Tensor):
                experts, stream = child.weight.shape
                yield experts, stream


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks: the longest list of modules."""
    longest: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(longest):
            longest = list(module)
    return longest


def uncounted(model: nn.Module) -> tuple[str, ...]:
    """Return the names of module types whose activations shapes do not determine.

    No estimate includes what these modules save.
    """
    routed: set[nn.Module] = set()
    for parent in model.modules():
        if _has_experts(parent):
            routed.update(parent.children())
    unknown = set()
    for module in model.modules():
        if not _is_known(module, routed=module in routed):
            unknown.add(type(module).__name__)
    return tuple(sorted(unknown))


def _projections(parent: nn.Module, head: nn.Module | None) -> Iterator[BlockPart]:
    shapes = _linears(parent, head)
    if not shapes:
        return
    *readers, writer = shapes.values()
    if "kv_b_proj" in shapes:
        query = shapes["q_b_proj"] if "q_b_proj" in shapes else shapes["q_proj"]
        inner = tuple(shapes[name] for name in ("q_b_proj", "kv_b_proj") if name in shapes)
        yield LatentAttentionPart(stream=readers[0][1], inner=inner, query=query[0], writer=writer)
    else:
        yield PlainPart(tuple(readers), writer, _activation(parent))


def _experts(parent: nn.Module) -> Iterator[ExpertsPart]:
    chosen = _chosen(parent)
    for child in parent.children():
        kernel = getattr(getattr(child, "config", None), "_experts_implementation", "eager")
        if chosen is not None and kernel in KERNELS and supports(child):
            _, stream, inner = getattr(child, STACKS[1]).shape
            yield ExpertsPart(chosen, (stream, inner), kernel, _activation(child))


def _has_experts(parent: nn.Module) -> bool:
    return next(_experts(parent), None) is not None


def _chosen(parent: nn.Module) -> int | None:
    """Return how many experts a token uses: `top_k` of the parent module or of its router."""
    for module in (parent, *parent.children()):
        top_k = getattr(module, "top_k", None)
        if isinstance(top_k, int):
            return top_k
    return None


def _linears(parent: nn.Module, head: nn.Module | None) -> dict[str, Shape]:
    shapes = {}
    for name, child in parent.named_children():
        weight = None if child is head else base_weight(child)
        if weight is not None:
            shapes[name] = weight.shape
    return shapes


def _is_known(module: nn.Module, *, routed: bool) -> bool:
    if next(module.parameters(recurse=False), None) is None:
        # The width of a norm without a weight is unknown.
        return not type(module).__name__.endswith("Norm")
    if base_weight(module) is not None or isinstance(module, nn.Embedding) or _is_norm(module):
        return True
    return routed and (supports(module) or _is_router(module))


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return (
        "weight" in own
        and own.keys() <= {"weight", "bias"}
        and all(parameter.dim() == 1 for parameter in own.values())
    )


def _is_router(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        base_weight(module) is None
        and weight is not None
        and weight.dim() == 2
        and hasattr(module, "top_k")
    )


def _activation(parent: nn.Module) -> Activation:
    for name in ACTIVATIONS:
        module = getattr(parent, name, None)
        if isinstance(module, nn.Module):
            has_parameters = next(module.parameters(), None) is not None
            return SMOOTH if has_parameters else _probe_activation(module)
    return SMOOTH


def _probe_activation(module: nn.Module) -> Activation:
    """Apply an activation function on the meta device and record what autograd saves."""
    x = torch.empty(1, device="meta", requires_grad=True)
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[_storage_id(tensor)] = tensor  # keeps the storage alive, so that its id stays unique
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        result = module(x)
    others = saved.keys() - {_storage_id(x), _storage_id(result)}
    return Activation(input=_storage_id(x) in saved, others=len(others))


def _storage_id(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
