"""The parts of a decoder's blocks, told by the shapes and names of their modules: what stands between two readings of the stream.

    plain     readers that share one input (q, k, v; gate, up) and, last, a writer into the stream (o; down)
    latent    attention whose queries, keys and values pass a narrow place: q_a, q_b, kv_a, kv_b, o (DeepSeek-V2, arXiv 2405.04434)
    experts   stacks of gated units, of which each token visits K (`lora_core.layers.expert_layout`)

Each part says how many numbers it keeps for a token, from its forward pass for its backward pass. What is none of these, nor a
norm, an embedding or a router, has a memory that its shapes don't tell: `uncounted` names it.

Shapes: D width of the residual stream, W what a writer reads, I inner width and K experts a token of a stack.
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
"""Names under which the units of Hugging Face's models hold their activation."""


@dataclass(frozen=True)
class Trained:
    """What of a model is trained, as far as its activations are concerned."""

    full: bool = False
    """Everything."""
    stacks: frozenset[str] = frozenset()
    """Stacks of experts that carry an adapter."""


@dataclass(frozen=True)
class Activation:
    """What an activation keeps of each number that passes it, its result aside."""

    input: bool
    others: int
    """Intermediate results: some activations are formed in several steps."""


KERNELS = {"eager": 2, "grouped_mm": 1}
"""How transformers computes experts → how often an answer is kept: for the router's weight, and by the loop that adds it up.

`batched_mm` keeps a copy of the weights for each token, which no training can afford."""
SMOOTH = Activation(input=True, others=0)
"""Such as SiLU and GELU in one kernel."""


class Part(Protocol):
    """A part of a block."""

    @property
    def writer(self) -> Shape: ...

    def kept(self, trained: Trained) -> int:
        """Numbers that are kept for a token."""

    @property
    def in_flight(self) -> int:
        """Gradients for a token of what the writer reads and of what the readers give, which a backward pass holds at once."""


@dataclass(frozen=True)
class Plain:
    """Readers and a writer."""

    readers: tuple[Shape, ...]
    writer: Shape
    activation: Activation = SMOOTH

    def kept(self, trained: Trained) -> int:
        """The shared input, what the readers give, what the writer reads, and what stands between.

        Attention keeps its result and the copy that o reads, a gated unit its activated gate and the product that down reads.
        """
        given, written_from = self._given, self.writer[1]
        shared = self.readers[0][1] if self.readers else 0
        between = written_from if self.readers and given != written_from else 0
        activated = written_from if self.readers else 0
        return (
            shared
            + given
            + written_from
            + between
            + activated * (self.activation.others - (not self.activation.input))
        )

    @property
    def in_flight(self) -> int:
        return self.writer[1] + self._given

    @property
    def _given(self) -> int:
        return sum(out for out, _ in self.readers)


@dataclass(frozen=True)
class Latent:
    """Attention whose keys and values, and often its queries, are made from narrow vectors."""

    stream: int
    """D."""
    inner: tuple[Shape, ...]
    """q_b, where there is one, and kv_b: they read the narrow vectors."""
    query: int
    """Width of all queries; keys are put together as wide."""
    writer: Shape

    def kept(self, trained: Trained) -> int:
        """The shared input and the narrow ones, queries, keys, what kv_b gives, the result and the copy that o reads."""
        narrow = sum(wide for _, wide in self.inner)
        return self.stream + narrow + 2 * self.query + self.inner[-1][0] + 2 * self.writer[1]

    @property
    def in_flight(self) -> int:
        return 2 * self.query + self.inner[-1][0] + self.writer[1]


@dataclass(frozen=True)
class Experts:
    """Stacks of gated units."""

    chosen: int
    """K."""
    writer: Shape
    """(D, I) of the stack down_proj."""
    kernel: str
    """How the base computes them; adapted ones are computed in a loop, as by `eager`."""
    activation: Activation = SMOOTH

    def kept(self, trained: Trained) -> int:
        """For each expert of a token: gate and up, the activated gate, and the answer.

        A trained stack also keeps its inputs: the token, gathered for each of its experts, or what down_proj reads.
        """
        stream, inner = self.writer
        answers = KERNELS["eager" if trained.stacks else self.kernel]
        inputs = sum(
            width
            for name, width in zip(STACKS, (stream, inner), strict=True)
            if trained.full or name in trained.stacks
        )
        return self.chosen * ((3 + self.activation.others) * inner + answers * stream + inputs)

    @property
    def in_flight(self) -> int:
        return self.chosen * 3 * self.writer[1]


@dataclass(frozen=True)
class Norm:
    """A module whose weights are vectors."""

    width: int
    """Numbers that it reads for a token."""
    upcast: bool
    """It computes in float32 step by step, as RMSNorm is written; else in one kernel, in the dtype it is given."""


def linear_shapes(model: nn.Module) -> Iterator[Shape]:
    """Yield the shape of every linear layer but the output head."""
    head = output_head(model)
    for parent in model.modules():
        yield from _linears(parent, head).values()


def parts(model: nn.Module) -> list[Part]:
    """Return the parts of a model or a block in order; the output head is none."""
    head = output_head(model)
    found: list[Part] = []
    for module in model.modules():
        found += [*_layers(module, head), *_experts(module)]
    return found


def norms(model: nn.Module) -> Iterator[Norm]:
    """Yield the norms of a model or a block.

    One inside attention, narrower than the reader that it follows, is as wide as a head and reads all of them.
    """
    for parent in model.modules():
        readers = [] if hasattr(parent, "kv_b_proj") else list(_linears(parent, None).values())[:-1]
        for index, norm in enumerate(child for child in parent.children() if _is_norm(child)):
            width = next(norm.parameters()).numel()
            follows = index < len(readers) and width < readers[index][1]
            yield Norm(readers[index][0] if follows else width, not isinstance(norm, nn.LayerNorm))


def routers(model: nn.Module) -> Iterator[Shape]:
    """Yield the shapes (E, D) of the routers that are no linear layers."""
    for parent in model.modules():
        if _holds_experts(parent):
            weights = (
                child.weight
                for child in parent.children()
                if _is_router(child) and isinstance(child.weight, Tensor)
            )
            yield from ((weight.shape[0], weight.shape[1]) for weight in weights)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks: the longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def uncounted(model: nn.Module) -> tuple[str, ...]:
    """Name the kinds of modules whose activations the shapes don't tell; what they keep is in no figure."""
    routing = {
        id(child)
        for parent in model.modules()
        if _holds_experts(parent)
        for child in parent.children()
    }
    unknown = (
        module for module in model.modules() if not _is_known(module, routed=id(module) in routing)
    )
    return tuple(sorted({type(module).__name__ for module in unknown}))


def _layers(parent: nn.Module, head: nn.Module | None) -> Iterator[Part]:
    shapes = _linears(parent, head)
    if not shapes:
        return
    *readers, writer = shapes.values()
    if "kv_b_proj" in shapes:
        query = shapes["q_b_proj"] if "q_b_proj" in shapes else shapes["q_proj"]
        inner = tuple(shapes[name] for name in ("q_b_proj", "kv_b_proj") if name in shapes)
        yield Latent(readers[0][1], inner, query[0], writer)
    else:
        yield Plain(tuple(readers), writer, _activation(parent))


def _experts(parent: nn.Module) -> Iterator[Experts]:
    chosen = _chosen(parent)
    for child in parent.children():
        kernel = getattr(getattr(child, "config", None), "_experts_implementation", "eager")
        if chosen is not None and kernel in KERNELS and supports(child):
            _, stream, inner = getattr(child, STACKS[1]).shape
            yield Experts(chosen, (stream, inner), kernel, _activation(child))


def _holds_experts(parent: nn.Module) -> bool:
    return any(True for _ in _experts(parent))


def _chosen(parent: nn.Module) -> int | None:
    """Return how many experts a token visits, as the router beside them or the module around them notes it."""
    found = (getattr(module, "top_k", None) for module in (parent, *parent.children()))
    return next((k for k in found if isinstance(k, int)), None)


def _linears(parent: nn.Module, head: nn.Module | None) -> dict[str, Shape]:
    weights = {
        name: base_weight(child) for name, child in parent.named_children() if child is not head
    }
    return {name: weight.shape for name, weight in weights.items() if weight is not None}


def _is_known(module: nn.Module, *, routed: bool) -> bool:
    own = list(module.parameters(recurse=False))
    if not own:
        return not type(module).__name__.endswith(
            "Norm"
        )  # without a weight it does not tell its width
    known = base_weight(module) is not None or isinstance(module, nn.Embedding) or _is_norm(module)
    return known or (routed and (supports(module) or _is_router(module)))


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
    module = next(
        (
            found
            for name in ACTIVATIONS
            if isinstance(found := getattr(parent, name, None), nn.Module)
        ),
        None,
    )
    return SMOOTH if module is None or any(True for _ in module.parameters()) else _probed(module)


def _probed(module: nn.Module) -> Activation:
    """Let an activation pass a number of the meta device, and look at what autograd keeps."""
    given = torch.empty(1, device="meta", requires_grad=True)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[_memory(tensor)] = tensor  # held, so that no address is used twice
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = module(given)
    return Activation(_memory(given) in kept, len(kept.keys() - {_memory(given), _memory(result)}))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
