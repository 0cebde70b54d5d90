"""What each kind of part of a decoder's block saves for the backward pass, in numbers per token.

A part reads the residual stream and writes its output into the stream:

    plain     readers that share one input (q, k, v; gate, up) and a final writer (o; down)
    latent    attention with low-rank queries, keys and values: q_a, q_b, kv_a, kv_b, o
              (DeepSeek-V2, arXiv 2405.04434)
    experts   stacks of gated units; each token uses K of them (`lora_core.layers.expert_layout`)

Shapes: D width of the residual stream, I inner width of an expert, K experts per token.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lora_core.layers.expert_layout import STACKS

KERNELS = {"eager": 2, "grouped_mm": 1}
"""Implementation of experts in transformers → copies of an expert's output that are saved.

One copy is for the router's weight, another is saved by the loop that sums the outputs.
`batched_mm` is missing, because it saves a copy of the weights per token, too much for training.
"""


class LinearShape(NamedTuple):
    """The shape of a linear layer."""

    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


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


SMOOTH = Activation(input=True, others=0)
"""For example SiLU, or GELU in one kernel."""


class BlockPart(Protocol):
    """A part of a block."""

    @property
    def writer(self) -> LinearShape:
        """The layer that writes into the residual stream."""

    def saved(self, trained: TrainedScope) -> int:
        """Return how many numbers per token are saved.

        Args:
            trained: which weights are trained.
        """

    @property
    def in_flight(self) -> int:
        """Gradients per token of the writer's input and the readers' outputs, alive at once."""


@dataclass(frozen=True)
class PlainPart:
    """Readers and a writer."""

    readers: tuple[LinearShape, ...]
    writer: LinearShape
    activation: Activation = SMOOTH

    def saved(self, trained: TrainedScope) -> int:
        """Return the shared input, readers' outputs, intermediate results and the writer's input.

        Attention saves its result and the copy that o reads. A gated unit saves its activated gate
        and the product that down reads.

        Args:
            trained: without effect on this kind of part.
        """
        reader_outputs = self._reader_outputs
        writer_input = self.writer.in_features
        if not self.readers:
            return reader_outputs + writer_input
        shared_input = self.readers[0].in_features
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
        """See `BlockPart`."""
        return self.writer.in_features + self._reader_outputs

    @property
    def _reader_outputs(self) -> int:
        return sum(reader.out_features for reader in self.readers)


@dataclass(frozen=True)
class LatentAttentionPart:
    """Attention that computes keys and values, and often queries, from low-rank vectors."""

    stream: int
    """D."""
    inner: tuple[LinearShape, ...]
    """q_b, if there is one, and kv_b: they read the low-rank vectors."""
    query: int
    """Width of all queries; the concatenated keys have the same width."""
    writer: LinearShape
    """o."""

    def saved(self, trained: TrainedScope) -> int:
        """Return the numbers saved per token.

        These are the shared input, the low-rank vectors, queries, keys, the output of kv_b, the
        result and the copy that o reads.

        Args:
            trained: without effect on this kind of part.
        """
        low_rank = sum(layer.in_features for layer in self.inner)
        inputs = self.stream + low_rank
        queries_and_keys = 2 * self.query
        results = 2 * self.writer.in_features
        return inputs + queries_and_keys + self._kv_b_output + results

    @property
    def in_flight(self) -> int:
        """See `BlockPart`."""
        return 2 * self.query + self._kv_b_output + self.writer.in_features

    @property
    def _kv_b_output(self) -> int:
        return self.inner[-1].out_features


@dataclass(frozen=True)
class ExpertsPart:
    """Stacks of gated units."""

    chosen: int
    """K."""
    writer: LinearShape
    """(D, I) of the stack down_proj."""
    kernel: str
    """The implementation in the base; adapted stacks are computed in a loop, as by `eager`."""
    activation: Activation = SMOOTH

    def saved(self, trained: TrainedScope) -> int:
        """Return, for each expert of a token, gate and up, the activated gate and the output.

        A trained stack also saves its inputs: the token, gathered for each of its experts, or the
        input of down_proj.

        Args:
            trained: which weights are trained.
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
        """See `BlockPart`."""
        return self.chosen * 3 * self.writer.in_features


@dataclass(frozen=True)
class Norm:
    """A module whose weights are vectors."""

    width: int
    """Numbers that it reads per token."""
    upcast: bool
    """It computes in float32 step by step, as RMSNorm does.

    Otherwise it computes in one kernel, in the dtype of its input.
    """


class Router(NamedTuple):
    """A router that is not a linear layer: it chooses the experts of each token."""

    experts: int
    """Number of experts to choose from."""
    stream: int
    """D."""
