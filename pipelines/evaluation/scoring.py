"""Log-likelihoods of answers: shared tokens are read once, logits exist at scored positions only.

Each tree of tokens is one segment of a pack with its own mask; see `trees`. Packs have no padding,
and their content depends on the questions alone, so a model's scores are the same to the bit
whichever models are scored in the same process.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_core.training.attention import Segment
from pipelines.comparison.record_types import TaskRecord
from pipelines.evaluation.trees import Tree, bin_pack, mask
from pipelines.models.checked import CheckedReader
from pipelines.models.packs import INPUT_IDS, SUPERVISED, Pack, join, pack
from pipelines.runtime.stage import digest

PACK_TOKENS = 1024
HEAD_ROWS = 128
"""Positions whose logits exist at once: 128 × 49,152 in float32 are 25 MB, which glibc keeps for
the next ones; above 32 MB it would return them to the kernel and get zeroed pages back one by one.
"""
EXAMPLES = 8
"""Held-out examples in a pack."""


@dataclass(frozen=True)
class Score:
    """The score of one answer."""

    log_likelihood: float
    """Of its scored tokens, in nats."""
    tokens: int
    greedy: bool
    """Whether each of them is the likeliest."""


@torch.inference_mode()
def score(reader: CheckedReader, trees: Sequence[Tree]) -> list[list[Score]]:
    """Return, for each tree, the score of each of its answers.

    Args:
        reader: of the model; verified on two trees before the first pack.
        trees: of one prompt and its answers each, in any order.
    """
    check_trees(reader, trees)
    device = str(reader.model.device)
    found: list[list[Score]] = [[] for _ in trees]
    for indices in bin_pack(trees, PACK_TOKENS):
        group = [trees[index] for index in indices]
        packed = tree_pack(group, device)
        likelihoods, greedy = reader.log_likelihoods(packed, HEAD_ROWS)
        start = 0
        for index, tree in zip(indices, group, strict=True):
            for answer in tree.answers:
                end = start + len(answer.targets)
                answer_score = _score(likelihoods[start:end], greedy[start:end])
                found[index].append(answer_score)
                start = end
    return found


@torch.inference_mode()
def score_examples(
    reader: CheckedReader, examples: Sequence[dict[str, Any]]
) -> Iterator[TaskRecord]:
    """Yield, for each held-out example, the summed NLL of its supervised tokens and their number.

    The digest of an example covers its token ids and which of them are supervised, as JSON, so that
    records with equal digests are of equal items.

    Args:
        reader: of the model; verified on two examples before the first pack.
        examples: rows of the prepared data, with their columns.
    """
    check_examples(reader, examples)
    device = str(reader.model.device)
    for start in range(0, len(examples), EXAMPLES):
        end = min(start + EXAMPLES, len(examples))
        chunk = [examples[index] for index in range(start, end)]
        likelihoods, _ = reader.log_likelihoods(pack(chunk, device), HEAD_ROWS)
        supervised = [list(example[SUPERVISED]) for example in chunk]
        counts = list(map(sum, supervised))
        for offset, values in enumerate(likelihoods.split(counts)):
            ids = list(chunk[offset][INPUT_IDS])
            yield TaskRecord(
                id=start + offset,
                prompt_sha256=digest([ids, supervised[offset]]),
                nll=-float(values.sum()),
                tokens=counts[offset],
            )


def check_examples(reader: CheckedReader, examples: Sequence[dict[str, Any]]) -> None:
    """Verify the reader on the longest and the shortest example, so that no later one has to be.

    Args:
        reader: of the model.
        examples: rows of the prepared data; nothing is verified without any.

    Raises:
        BaseModelError: no way of reading agrees with the model's own forward.
    """
    if not examples:
        return
    by_length = sorted(examples, key=lambda example: len(example[INPUT_IDS]))
    longest_and_shortest = [by_length[-1], by_length[0]]
    reader.check(pack(longest_and_shortest, str(reader.model.device)))


def check_trees(reader: CheckedReader, trees: Sequence[Tree]) -> None:
    """Verify the reader on the deepest and the smallest tree, so that no later one has to be.

    Args:
        reader: of the model.
        trees: nothing is verified if none has a scored token.

    Raises:
        BaseModelError: no way of reading agrees with the model's own forward.
    """
    scored = list(filter(_is_scored, trees))
    if not scored:
        return
    deepest = max(scored, key=lambda tree: max(tree.depths))
    smallest = min(scored, key=lambda tree: len(tree.tokens))
    group = [deepest] if deepest is smallest else [deepest, smallest]
    reader.check(tree_pack(group, str(reader.model.device)))


def _is_scored(tree: Tree) -> bool:
    return any(answer.predicts for answer in tree.answers)


def tree_pack(group: Sequence[Tree], device: str) -> Pack:
    """Put trees one after the other into one row; predictions are ordered answer by answer.

    Args:
        group: trees of T₁, T₂, … tokens; the pack has all of them, T = T₁ + T₂ + ….
        device: of the model.
    """
    return join([_pack_of_one(tree, device) for tree in group])


def _pack_of_one(tree: Tree, device: str) -> Pack:
    predicts = list[int]()
    targets = list[int]()
    for answer in tree.answers:
        predicts += answer.predicts
        targets += answer.targets
    on_device = partial(torch.tensor, device=device)
    return Pack(
        input_ids=on_device(tree.tokens),
        position_ids=on_device(tree.depths),
        segments=[Segment(len(tree.tokens), mask(tree).to(device))],
        predicts=on_device(predicts),
        targets=on_device(targets),
    )


def _score(likelihoods: Tensor, greedy: Tensor) -> Score:
    return Score(float(likelihoods.sum()), len(likelihoods), bool(greedy.all()))
