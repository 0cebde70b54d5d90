"""Log-likelihoods of answers: what answers share is read once, and the output head sees scored positions only.

Each tree of tokens is one segment of a pack under a mask of its own; see `trees`. Packs hold no padding, and what is in
them depends on the questions alone, so a model scores the same to the bit whichever models are scored beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_core.training.attention import Segment
from pipelines.evaluation.trees import Tree, mask, packs
from pipelines.models.checked import CheckedReader
from pipelines.models.packs import Pack, join, pack
from pipelines.runtime.stage import digest

PACK_TOKENS = 1024
HEAD_ROWS = 128
"""Positions whose logits exist at once: 128 × 49,152 in float32 are 25 MB, which glibc keeps for the next ones; above 32 MB
it would give them back to the kernel and fetch them anew, zeroed, page by page."""
EXAMPLES = 8
"""Held-out examples in a pack."""


@dataclass(frozen=True)
class Score:
    """One answer's figures."""

    log_likelihood: float
    """Of its scored tokens, in nats."""
    tokens: int
    greedy: bool
    """Whether each of them is the likeliest."""


@torch.inference_mode()
def score(reader: CheckedReader, trees: Sequence[Tree]) -> list[list[Score]]:
    """Return, for each tree, the score of each of its answers."""
    check_trees(reader, trees)
    found: list[list[Score]] = [[] for _ in trees]
    for places in packs(trees, PACK_TOKENS):
        group = [trees[place] for place in places]
        likelihoods, greedy = reader.log_likelihoods(
            tree_pack(group, str(reader.model.device)), HEAD_ROWS
        )
        counts = [len(answer.targets) for tree in group for answer in tree.answers]
        parts = zip(likelihoods.split(counts), greedy.split(counts), strict=True)
        for place, tree in zip(places, group, strict=True):
            found[place] = [_score(*next(parts)) for _ in tree.answers]
    return found


@torch.inference_mode()
def score_examples(
    reader: CheckedReader, examples: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield, for each held-out example, the summed negative log-likelihood of its supervised tokens and their number.

    Its digest is that of the JSON of its token ids and of which of them are supervised, so that equal records are of equal items.
    """
    check_examples(reader, examples)
    for start in range(0, len(examples), EXAMPLES):
        part = [examples[i] for i in range(start, min(start + EXAMPLES, len(examples)))]
        likelihoods, _ = reader.log_likelihoods(pack(part, str(reader.model.device)), HEAD_ROWS)
        counts = [sum(example["supervised"]) for example in part]
        for offset, (count, values) in enumerate(
            zip(counts, likelihoods.split(counts), strict=True)
        ):
            asked = digest([list(part[offset][name]) for name in ("input_ids", "supervised")])
            yield {
                "kind": "task",
                "id": start + offset,
                "prompt_sha256": asked,
                "nll": -float(values.sum()),
                "tokens": count,
            }


def check_examples(reader: CheckedReader, examples: Sequence[dict[str, Any]]) -> None:
    """Verify the way of reading on the longest and the shortest example at once, so that no later one has to be."""
    if examples:
        by_length = sorted(examples, key=lambda example: len(example["input_ids"]))
        reader.check(pack([by_length[-1], by_length[0]], str(reader.model.device)))


def check_trees(reader: CheckedReader, trees: Sequence[Tree]) -> None:
    """Verify the way of reading on the deepest and the smallest tree at once, so that no later one has to be."""
    scored = [tree for tree in trees if any(answer.predicts for answer in tree.answers)]
    if scored:
        deepest, smallest = (
            max(scored, key=lambda tree: max(tree.depths)),
            min(scored, key=lambda tree: len(tree.tokens)),
        )
        reader.check(
            tree_pack(
                [deepest] if deepest is smallest else [deepest, smallest], str(reader.model.device)
            )
        )


def tree_pack(group: Sequence[Tree], device: str) -> Pack:
    """Put trees one after the other into one row; what their answers' tokens predict comes answer by answer."""
    return join([_alone(tree, device) for tree in group])


def _alone(tree: Tree, device: str) -> Pack:
    return Pack(
        input_ids=torch.tensor(tree.tokens, device=device),
        position_ids=torch.tensor(tree.depths, device=device),
        segments=[Segment(len(tree.tokens), mask(tree).to(device))],
        predicts=torch.tensor(
            [place for answer in tree.answers for place in answer.predicts], device=device
        ),
        targets=torch.tensor(
            [token for answer in tree.answers for token in answer.targets], device=device
        ),
    )


def _score(likelihoods: Tensor, greedy: Tensor) -> Score:
    return Score(float(likelihoods.sum()), len(likelihoods), bool(greedy.all()))
