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

from pipelines.data.rendering.token_positions import tokens_before_a_text


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
    growing = _GrowingTree()
    path_of = dict[tuple[int, ...], list[int]]()
    for read in sorted({tuple(ids[:-1]) for ids in wholes}):
        path_of[read] = growing.add(read)
    answers = []
    for start, ids in zip(starts, wholes, strict=True):
        path = path_of[tuple(ids[:-1])]
        answers.append(ScoredAnswer(predicts=path[start - 1 :], targets=ids[start:]))
    return Tree(growing.tokens, growing.depths, growing.ends, answers)


class _GrowingTree:
    """A tree to which token sequences are added in ascending order, so that it is in preorder."""

    def __init__(self) -> None:
        self.tokens = list[int]()
        self.depths = list[int]()
        self.ends = list[int]()
        self._last = tuple[int, ...]()
        """The sequence that was added last."""
        self._path = list[int]()
        """Indices of its tokens in the tree."""

    def add(self, read: tuple[int, ...]) -> list[int]:
        """Add the tokens that the last sequence does not share; return the index of each token."""
        shared = _shared_prefix(self._last, read)
        first = len(self.tokens)
        end = first + len(read) - shared
        self.tokens += read[shared:]
        self.depths += range(shared, len(read))
        self.ends += [end] * (end - first)
        path = self._path[:shared]
        for index in path:
            self.ends[index] = end
        path += range(first, end)
        self._last = read
        self._path = path
        return path


def mask(tree: Tree) -> Tensor:
    """Return who attends to whom, (T, T) of bool: each token to itself and to its ancestors.

    Args:
        tree: of T tokens in preorder.
    """
    indices = torch.arange(len(tree.tokens))
    rows = indices[:, None]
    columns = indices[None, :]
    ends = torch.tensor(tree.ends)[None, :]
    is_at_or_after = rows >= columns
    is_descendant = rows < ends
    return is_at_or_after & is_descendant


def bin_pack(trees: Sequence[Tree], tokens: int) -> Iterator[list[int]]:
    """Yield the indices of the trees that are read together, longest first, without padding.

    Args:
        trees: to pack.
        tokens: maximum number of tokens in a pack of several trees.
    """
    group = list[int]()
    filled = 0
    sizes = [len(tree.tokens) for tree in trees]
    longest_first = sorted(range(len(trees)), key=lambda index: (-sizes[index], index))
    for index in longest_first:
        size = sizes[index]
        if group and filled + size > tokens:
            yield group
            group = []
            filled = 0
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
    by_tokens = sorted(units.values(), key=lambda indices: list(wholes[indices[0]]))
    group = list[int]()
    filled = 0
    for unit in by_tokens:
        first = wholes[unit[0]]
        shared = _shared_prefix(wholes[group[0]], first) if group else 0
        added = sum(len(wholes[index]) - shared for index in unit)
        is_different = 2 * shared < len(first)
        is_full = filled + added > tokens
        if group and (is_different or is_full):
            yield group
            added += shared * len(unit)
            group = []
            filled = 0
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
        special: add the tokens that it puts before a text, such as BOS; a chat template has
            already added them.
    """
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    prefix = tokens_before_a_text(tokenizer) if special else []
    all_ids = tokenizer(distinct, add_special_tokens=False).input_ids
    return {text: prefix + ids for text, ids in zip(distinct, all_ids, strict=True)}


def _shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first tokens two sequences share."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
