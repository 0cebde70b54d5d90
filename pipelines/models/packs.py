"""Pack several examples into one row without padding, and map each to how it is read alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_core.training.attention import Segment

INPUT_IDS = "input_ids"
SUPERVISED = "supervised"
"""Columns of the prepared data that are packed."""


@dataclass(frozen=True)
class Pack:
    """Several examples in one row of T tokens."""

    input_ids: Tensor
    """(T,)"""
    position_ids: Tensor
    """(T,), starting at 0 in each example."""
    segments: list[Segment]
    predicts: Tensor
    """(N,) positions whose next token is supervised."""
    targets: Tensor
    """(N,) those next tokens."""

    @property
    def longest(self) -> int:
        """The number of tokens of the longest example."""
        return int(self.position_ids.max()) + 1

    @property
    def has_trees(self) -> bool:
        """Whether answers share a prompt."""
        return any(segment.mask is not None for segment in self.segments)

    def paths(self) -> "list[ExamplePath]":
        """Return the examples one by one, as they would be read alone.

        Of a tree these are its answers, each with its complete prompt.
        """
        predicts = self.predicts.cpu()
        found = list[ExamplePath]()
        start = 0
        for segment in self.segments:
            end = start + segment.length
            rows = ((predicts >= start) & (predicts < end)).nonzero()[:, 0]
            found += _paths(segment, start, rows, predicts)
            start = end
        return found

    def pieces(self) -> "list[Pack]":
        """Return each segment as a pack by itself."""
        found = list[Pack]()
        start = 0
        for segment in self.segments:
            end = start + segment.length
            is_inside = (self.predicts >= start) & (self.predicts < end)
            piece = Pack(
                input_ids=self.input_ids[start:end],
                position_ids=self.position_ids[start:end],
                segments=[segment],
                predicts=self.predicts[is_inside] - start,
                targets=self.targets[is_inside],
            )
            found.append(piece)
            start = end
        return found

    def only(self, rows: Tensor) -> "Pack":
        """Return the same tokens with some of the predictions."""
        return replace(self, predicts=self.predicts[rows], targets=self.targets[rows])


@dataclass(frozen=True)
class ExamplePath:
    """One example of a pack: all its tokens, and where it predicts."""

    places: Tensor
    """(L,) indices of its tokens in the pack."""
    at: Tensor
    """(M,) positions in the example whose predictions count."""
    rows: Tensor
    """(M,) indices of these predictions in the pack."""


def _paths(segment: Segment, start: int, rows: Tensor, predicts: Tensor) -> Iterator[ExamplePath]:
    """Yield the example of a segment, or each answer of its tree with the tokens before it.

    Args:
        segment: of a pack.
        start: its first token in the pack.
        rows: (M,) the indices of its predictions in the pack.
        predicts: (N,) positions of all predictions of the pack.
    """
    if segment.mask is None:
        if len(rows):
            indices = torch.arange(start, start + segment.length)
            yield ExamplePath(indices, predicts[rows] - start, rows)
        return
    mask = segment.mask.cpu()
    for chain in _chains(mask, rows, predicts - start):
        positions = predicts[chain] - start
        read = mask[positions[-1]]  # up to the last token that predicts
        position_in_answer = read.cumsum(dim=0) - 1
        yield ExamplePath(start + read.nonzero()[:, 0], position_in_answer[positions], chain)


def _chains(mask: Tensor, rows: Tensor, positions: Tensor) -> Iterator[Tensor]:
    """Yield the rows of each answer: a chain whose tokens each have the one before as parent."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end < len(rows):
            last = int(positions[rows[end - 1]])
            following = int(positions[rows[end]])
            if _parent(mask, following) == last:
                continue
        yield rows[start:end]
        start = end


def _parent(mask: Tensor, position: int) -> int | None:
    """Return the position of the token before one in its answer."""
    ancestors = mask[position, :position].nonzero()[:, 0]
    return int(ancestors[-1]) if len(ancestors) else None


def pack(examples: Sequence[dict[str, Any]], device: str) -> Pack:
    """Put examples one after the other into one row.

    Args:
        examples: rows with token ids and, for each of them, whether it is supervised. The first
            token of an example is not supervised, because nothing predicts it.
        device: of the tensors.
    """
    ids = list[Tensor]()
    supervised = list[Tensor]()
    positions = list[Tensor]()
    segments = list[Segment]()
    for example in examples:
        tokens = example[INPUT_IDS]
        ids.append(torch.tensor(tokens))
        supervised.append(torch.tensor(example[SUPERVISED]))
        positions.append(torch.arange(len(tokens)))
        segments.append(Segment(len(tokens)))
    input_ids = torch.cat(ids)
    position_ids = torch.cat(positions)
    targets_at = torch.cat(supervised).nonzero()[:, 0]
    return Pack(
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        segments=segments,
        predicts=(targets_at - 1).to(device),
        targets=input_ids[targets_at].to(device),
    )


def join(packs: Sequence[Pack]) -> Pack:
    """Put packs one after the other into one row."""
    segments = list[Segment]()
    predicts = list[Tensor]()
    start = 0
    for one in packs:
        segments += one.segments
        predicts.append(one.predicts + start)
        start += len(one.input_ids)
    return Pack(
        input_ids=torch.cat([one.input_ids for one in packs]),
        position_ids=torch.cat([one.position_ids for one in packs]),
        segments=segments,
        predicts=torch.cat(predicts),
        targets=torch.cat([one.targets for one in packs]),
    )
