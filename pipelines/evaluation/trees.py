"""A prompt and the answers that continue it, as a tree of tokens: shared tokens are read once.

An answer's tokens are those of context and answer tokenized as one text. Each token of the tree is
read after those between it and the root. The last token of an answer predicts nothing and is not
read.

    the ─ capital ─ of ┬ France ─ is
                       └ Spain ─ is

Tokens are in preorder, so that the descendants of a token follow it without a gap: the mask is two
comparisons.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoredAnswer:
    """Where an answer is scored."""

    predicts: list[int]
    """Indices of the tokens of the tree whose next token counts."""
    targets: list[int]
    """Those next tokens."""


@dataclass(frozen=True)
class Tree:
    """Answers to one prompt, of T tokens that are read."""

    tokens: list[int]
    """(T,)"""
    depths: list[int]
    """(T,) number of tokens before each one."""
    ends: list[int]
    """(T,) end of the descendants of each token, exclusive."""
    answers: list[ScoredAnswer]

    @property
    def context(self) -> int:
        """How many tokens the model's context must hold."""
        return max(self.depths) + 1


def build_prefix_tree(wholes: Sequence[list[int]], starts: Sequence[int]) -> Tree | None:
    """Return the tree of several answers; None if one has no context or no scored token.

    Args:
        wholes: the tokens of context and answer, for each answer.
        starts: for each answer, the first token that counts.
    """
    for start, ids in zip(starts, wholes, strict=True):
        if not 0 < start < len(ids):
            return None
    tokens, depths, ends = list[int](), list[int](), list[int]()
    path_of = dict[tuple[int, ...], list[int]]()
    path, previous = list[int](), tuple[int, ...]()
    for read in sorted({tuple(ids[:-1]) for ids in wholes}):
        shared = _shared_prefix(previous, read)
        added = len(read) - shared
        path = path[:shared] + list(range(len(tokens), len(tokens) + added))
        tokens += read[shared:]
        depths += range(shared, len(read))
        ends += [0] * added
        for index in path:
            ends[index] = len(tokens)
        path_of[read] = path
        previous = read
    answers = []
    for start, ids in zip(starts, wholes, strict=True):
        path = path_of[tuple(ids[:-1])]
        answers.append(ScoredAnswer(path[start - 1 :], ids[start:]))
    return Tree(tokens, depths, ends, answers)


def mask(tree: Tree) -> Tensor:
    """Return who attends to whom, (T, T) of bool: each token to itself and to its ancestors."""
    indices = torch.arange(len(tree.tokens))
    rows, columns = indices[:, None], indices[None, :]
    ends = torch.tensor(tree.ends)[None, :]
    return (rows >= columns) & (rows < ends)


def bin_pack(trees: Sequence[Tree], tokens: int) -> Iterator[list[int]]:
    """Yield the indices of the trees that are read together, longest first, without padding.

    Args:
        trees: to pack.
        tokens: maximum number of tokens in a pack of several trees.
    """
    group, filled = list[int](), 0
    for index in sorted(range(len(trees)), key=lambda i: (-len(trees[i].tokens), i)):
        size = len(trees[index].tokens)
        if group and filled + size > tokens:
            yield group
            group, filled = [], 0
        group.append(index)
        filled += size
    if group:
        yield group


def group_by_prefix(
    wholes: Sequence[Sequence[int]], contexts: Sequence[str], tokens: int
) -> Iterator[list[int]]:
    """Yield the indices of the answers that share one tree.

    Answers after one context share a tree, and so do contexts of which at least half is the same,
    such as those that start with the same few-shot examples.

    Args:
        wholes: the tokens of context and answer, for each answer.
        contexts: the text before each answer.
        tokens: maximum number of tokens in a tree of several contexts.
    """
    units: dict[str, list[int]] = {}
    for index, context in enumerate(contexts):
        units.setdefault(context, []).append(index)
    group, filled = list[int](), 0
    for unit in sorted(units.values(), key=lambda indices: list(wholes[indices[0]])):
        first = wholes[unit[0]]
        shared = _shared_prefix(wholes[group[0]], first) if group else 0
        added = sum(len(wholes[index]) - shared for index in unit)
        if group and (2 * shared < len(first) or filled + added > tokens):
            yield group
            added += shared * len(unit)
            group, filled = [], 0
        group = group + unit
        filled += added
    if group:
        yield group


def encode(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, special: bool = True
) -> dict[str, list[int]]:
    """Return the tokens of each text, equal texts once, in one call of the tokenizer.

    Args:
        texts: any number of them.
        tokenizer: the base's.
        special: let it add special tokens, such as one for the beginning; a chat template has
            already added them.
    """
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    ids = tokenizer(distinct, add_special_tokens=special).input_ids
    return dict(zip(distinct, ids, strict=True))


def _shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first tokens two sequences share."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
