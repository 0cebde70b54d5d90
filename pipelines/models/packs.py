"""Pack: several examples in one row without padding, and how each of them would be read alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_core.training.attention import Segment


@dataclass(frozen=True)
class Pack:
    """Several examples in one row of T tokens."""

    input_ids: Tensor
    """(T,)"""
    position_ids: Tensor
    """(T,), starting anew in each example."""
    segments: list[Segment]
    predicts: Tensor
    """(N,) positions whose next token is supervised."""
    targets: Tensor
    """(N,) those next tokens."""

    @property
    def longest(self) -> int:
        """Return the most tokens of one example."""
        return int(self.position_ids.max()) + 1

    def paths(self) -> "list[ExamplePath]":
        """Return the examples one by one, as they would be read alone; of a tree, each answer with its whole prompt."""
        predicts, begin = self.predicts.cpu(), 0
        found = list[ExamplePath]()
        for segment in self.segments:
            rows = ((predicts >= begin) & (predicts < begin + segment.length)).nonzero()[:, 0]
            found += _paths(segment, begin, rows, predicts)
            begin += segment.length
        return found

    @property
    def has_trees(self) -> bool:
        """Return whether answers share a prompt in it."""
        return any(segment.mask is not None for segment in self.segments)

    def pieces(self) -> "list[Pack]":
        """Return each segment as a pack by itself."""
        found, begin = list[Pack](), 0
        for segment in self.segments:
            end = begin + segment.length
            own = (self.predicts >= begin) & (self.predicts < end)
            row = slice(begin, end)
            found.append(
                Pack(
                    self.input_ids[row],
                    self.position_ids[row],
                    [segment],
                    self.predicts[own] - begin,
                    self.targets[own],
                )
            )
            begin = end
        return found

    def only(self, rows: Tensor) -> "Pack":
        """Return the same tokens with some of the predictions."""
        return replace(self, predicts=self.predicts[rows], targets=self.targets[rows])


@dataclass(frozen=True)
class ExamplePath:
    """One example of a pack: all tokens of it, and where it predicts."""

    places: Tensor
    """(L,) of its tokens in the pack."""
    at: Tensor
    """(M,) positions in the example whose predictions count."""
    rows: Tensor
    """(M,) which of the pack's predictions these are."""


def _paths(segment: Segment, begin: int, rows: Tensor, predicts: Tensor) -> Iterator[ExamplePath]:
    """Yield what is read for the predictions of a segment: the example, or for each answer of a tree the way down to it."""
    if segment.mask is None:
        if len(rows):
            yield ExamplePath(
                torch.arange(begin, begin + segment.length), predicts[rows] - begin, rows
            )
        return
    mask = segment.mask.cpu()
    for chain in _chains(mask, rows, predicts - begin):
        read = mask[predicts[chain[-1]] - begin]  # up to the last token that predicts
        yield ExamplePath(
            begin + read.nonzero()[:, 0], (read.cumsum(dim=0) - 1)[predicts[chain] - begin], chain
        )


def _chains(mask: Tensor, rows: Tensor, places: Tensor) -> Iterator[Tensor]:
    """Yield the rows of each answer: a chain goes on as long as a token's parent is the token before it."""
    begun = 0
    for row in range(1, len(rows) + 1):
        if row == len(rows) or not _is_parent(
            mask, int(places[rows[row - 1]]), int(places[rows[row]])
        ):
            yield rows[begun:row]
            begun = row


def _is_parent(mask: Tensor, place: int, child: int) -> bool:
    ancestors = mask[child, :child].nonzero()[:, 0]
    return len(ancestors) > 0 and int(ancestors[-1]) == place


def pack(examples: Sequence[dict[str, Any]], device: str) -> Pack:
    """Put examples one after the other into one row."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    supervised = torch.cat([torch.tensor(example["supervised"]) for example in examples])
    input_ids = torch.cat(ids)
    targets_at = supervised.nonzero()[:, 0]
    return Pack(
        input_ids=input_ids.to(device),
        position_ids=torch.cat([torch.arange(len(one)) for one in ids]).to(device),
        segments=[Segment(len(one)) for one in ids],
        predicts=(targets_at - 1).to(device),
        targets=input_ids[targets_at].to(device),
    )


def join(packs: Sequence[Pack]) -> Pack:
    """Put packs one after the other into one row."""
    begins = torch.tensor([0, *(len(one.input_ids) for one in packs)]).cumsum(0).tolist()
    return Pack(
        input_ids=torch.cat([one.input_ids for one in packs]),
        position_ids=torch.cat([one.position_ids for one in packs]),
        segments=[segment for one in packs for segment in one.segments],
        predicts=torch.cat(
            [one.predicts + begin for one, begin in zip(packs, begins, strict=False)]
        ),
        targets=torch.cat([one.targets for one in packs]),
    )
