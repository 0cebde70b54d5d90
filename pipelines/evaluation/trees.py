"""A prompt and the answers that continue it, as a tree of tokens: what answers share is read once, however far it goes.

An answer's tokens are what the tokenizer makes of context and answer read as one text. Each token of the tree is read
after those between it and the root. The last token of an answer predicts nothing and is not read.

    the ─ capital ─ of ┬ France ─ is
                       └ Spain ─ is

Tokens stand in preorder, so that what follows from a token is one stretch after it: the mask is two comparisons.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """Where an answer is scored."""

    predicts: list[int]
    """Places in the tree whose next token counts."""
    targets: list[int]
    """Those next tokens."""


@dataclass(frozen=True)
class Tree:
    """Answers to one prompt, of T tokens that are read."""

    tokens: list[int]
    """(T,)"""
    depths: list[int]
    """(T,) tokens before each one."""
    ends: list[int]
    """(T,) where the stretch of tokens that follow from each one ends."""
    answers: list[Answer]

    @property
    def context(self) -> int:
        """How many tokens the model's context must hold."""
        return max(self.depths) + 1


def build_prefix_tree(wholes: Sequence[list[int]], starts: Sequence[int]) -> Tree | None:
    """Return the tree of several answers; None where nothing is read before one, or nothing of one is scored.

    Args:
        wholes: the tokens of context and answer, for each answer.
        starts: for each answer, the first token that counts.
    """
    if any(not 0 < start < len(ids) for start, ids in zip(starts, wholes, strict=True)):
        return None
    tokens, depths, ends, paths = list[int](), list[int](), list[int](), {}
    path, before = list[int](), list[int]()
    for read in sorted({tuple(ids[:-1]) for ids in wholes}):
        shared = _shared(before, read)
        path = path[:shared] + list(range(len(tokens), len(tokens) + len(read) - shared))
        tokens += read[shared:]
        depths += range(shared, len(read))
        ends += [0] * (len(read) - shared)
        for place in path:
            ends[place] = len(tokens)
        paths[read], before = path, list(read)
    answers = [
        Answer(paths[tuple(ids[:-1])][start - 1 :], ids[start:])
        for ids, start in zip(wholes, starts, strict=True)
    ]
    return Tree(tokens, depths, ends, answers)


def mask(tree: Tree) -> Tensor:
    """Return who may look at whom, (T, T) of bool: each token at itself and at those it follows from."""
    places, ends = torch.arange(len(tree.tokens)), torch.tensor(tree.ends)
    return (places[:, None] >= places[None, :]) & (places[:, None] < ends[None, :])


def packs(trees: Sequence[Tree], tokens: int) -> Iterator[list[int]]:
    """Yield the places of the trees that are read together: the longest first, up to a number of tokens, without padding."""
    group, filled = list[int](), 0
    for place in sorted(range(len(trees)), key=lambda i: (-len(trees[i].tokens), i)):
        if group and filled + len(trees[place].tokens) > tokens:
            yield group
            group, filled = [], 0
        group.append(place)
        filled += len(trees[place].tokens)
    if group:
        yield group


def group_by_prefix(
    wholes: Sequence[Sequence[int]], contexts: Sequence[str], tokens: int
) -> Iterator[list[int]]:
    """Yield the places of the answers that are grown into one tree.

    Answers after one context stand together, and so do contexts of which at least half is the same, such as those that
    open with the same worked examples.

    Args:
        wholes: the tokens of context and answer, for each answer.
        contexts: the text before each answer.
        tokens: most tokens of a tree of several contexts.
    """
    units: dict[str, list[int]] = {}
    for place, context in enumerate(contexts):
        units.setdefault(context, []).append(place)
    group, filled = list[int](), 0
    for unit in sorted(units.values(), key=lambda places: list(wholes[places[0]])):
        shared = _shared(wholes[group[0]], wholes[unit[0]]) if group else 0
        new = sum(len(wholes[place]) - shared for place in unit)
        if group and (2 * shared < len(wholes[unit[0]]) or filled + new > tokens):
            yield group
            group, filled, new = [], 0, new + shared * len(unit)
        group, filled = group + unit, filled + new
    if group:
        yield group


def encode(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, special: bool = True
) -> dict[str, list[int]]:
    """Return the tokens of each text, equal texts once, in one call of the tokenizer.

    Args:
        texts: any number of them.
        tokenizer: the base's.
        special: let it add its own marks, such as one for the beginning; a chat template has written them already.
    """
    different = list(dict.fromkeys(texts))
    return (
        dict(
            zip(different, tokenizer(different, add_special_tokens=special).input_ids, strict=True)
        )
        if different
        else {}
    )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first tokens two sequences share."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
