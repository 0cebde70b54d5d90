"""Log-likelihoods of answers: what answers share is read once, and the output head sees scored positions only.

Each tree of tokens is one segment of a pack under a mask of its own; see `trees`. Packs hold no padding, and what is in
them depends on the questions alone, so a model scores the same to the bit whichever models are scored beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_core.training.attention import Segment
from lora_core.training.losses import token_log_likelihoods
from pipelines.batches import pack
from pipelines.evaluation.trees import Tree, mask, packs
from pipelines.model import head_weight, hidden_states
from pipelines.stage import digest

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
def score(model: PreTrainedModel, trees: Sequence[Tree]) -> list[list[Score]]:
    """Return, for each tree, the score of each of its answers."""
    found: list[list[Score]] = [[] for _ in trees]
    for places in packs(trees, PACK_TOKENS):
        group = [trees[place] for place in places]
        likelihoods, greedy = token_log_likelihoods(states_before(model, group), head_weight(model), targets(model, group), HEAD_ROWS)
        counts = [len(answer.targets) for tree in group for answer in tree.answers]
        parts = zip(likelihoods.split(counts), greedy.split(counts), strict=True)
        for place, tree in zip(places, group, strict=True):
            found[place] = [_score(*next(parts)) for _ in tree.answers]
    return found


@torch.inference_mode()
def score_examples(model: PreTrainedModel, examples: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield, for each held-out example, the summed negative log-likelihood of its supervised tokens and their number.

    Its digest is that of the JSON of its token ids and of which of them are supervised, so that equal records are of equal items.
    """
    for start in range(0, len(examples), EXAMPLES):
        part = [examples[i] for i in range(start, min(start + EXAMPLES, len(examples)))]
        packed = pack(part, str(model.device))
        states = hidden_states(model, packed.input_ids, packed.position_ids, packed.segments)
        likelihoods, _ = token_log_likelihoods(states[packed.predicts], head_weight(model), packed.targets, HEAD_ROWS)
        counts = [sum(example["supervised"]) for example in part]
        for offset, (count, values) in enumerate(zip(counts, likelihoods.split(counts), strict=True)):
            asked = digest([list(part[offset][name]) for name in ("input_ids", "supervised")])
            yield {"kind": "task", "id": start + offset, "prompt_sha256": asked, "nll": -float(values.sum()), "tokens": count}


def states_before(model: PreTrainedModel, group: Sequence[Tree]) -> Tensor:
    """Read a pack of trees; return the hidden states (N, D) of all positions that predict, answer by answer."""
    device, begin = model.device, 0
    predicts: list[int] = []
    for tree in group:
        predicts += [begin + place for answer in tree.answers for place in answer.predicts]
        begin += len(tree.tokens)
    segments = [Segment(len(tree.tokens), mask(tree).to(device)) for tree in group]
    ids = torch.tensor([token for tree in group for token in tree.tokens], device=device)
    positions = torch.tensor([depth for tree in group for depth in tree.depths], device=device)
    return hidden_states(model, ids, positions, segments)[torch.tensor(predicts, device=device)]


def targets(model: PreTrainedModel, group: Sequence[Tree]) -> Tensor:
    """Return the tokens (N,) that the positions of `states_before` predict."""
    return torch.tensor([token for tree in group for answer in tree.answers for token in answer.targets], device=model.device)


def _score(likelihoods: Tensor, greedy: Tensor) -> Score:
    return Score(float(likelihoods.sum()), len(likelihoods), bool(greedy.all()))
