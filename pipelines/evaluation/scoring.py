"""Log-likelihoods of answers: each prompt is read once, its answers branch off it, and the head sees answers only.

An item's tokens stand in one segment: the shared prompt, then each answer beside the others under a tree mask. The last
token of an answer predicts nothing and is left out. Items are packed without padding up to a number of tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_core.training.attention import Segment, tree_mask
from lora_core.training.losses import token_log_likelihoods
from pipelines.batches import pack
from pipelines.errors import DataError
from pipelines.evaluation.benchmarks import Item
from pipelines.model import head_weight, hidden_states

PACK_TOKENS = 1024


@dataclass(frozen=True)
class Branched:
    """An item as tokens."""

    item: Item
    prefix: list[int]
    branches: list[list[int]]
    """Each answer's tokens after the shared prefix."""
    scored_from: list[int]
    """For each branch, the first of its tokens that counts."""

    @property
    def length(self) -> int:
        return len(self.prefix) + sum(len(branch) - 1 for branch in self.branches)


@torch.inference_mode()
def score_items(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """Yield a record for each item: for each choice its log-likelihood in nats, its bytes and whether it is greedy."""
    branched = [branch(item, tokenizer) for item in items]
    for group in _packs(branched):
        yield from _score_pack(model, group)


@torch.inference_mode()
def score_examples(model: PreTrainedModel, examples: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield, for each held-out example, the summed negative log-likelihood of its supervised tokens and their number."""
    for start in range(0, len(examples), 8):
        part = [examples[i] for i in range(start, min(start + 8, len(examples)))]
        packed = pack(part, str(model.device))
        states = hidden_states(model, packed.input_ids, packed.position_ids, packed.segments)
        likelihoods, _ = token_log_likelihoods(states[packed.predicts], head_weight(model), packed.targets)
        counts = [sum(example["supervised"]) for example in part]
        for offset, (count, values) in enumerate(zip(counts, likelihoods.split(counts), strict=True)):
            yield {"kind": "task", "id": start + offset, "nll": -float(values.sum()), "tokens": count}


def branch(item: Item, tokenizer: PreTrainedTokenizerBase) -> Branched:
    """Tokenise each choice as one text with its context, and find what all of them share."""
    texts = [item.context + choice.lead + choice.scored for choice in item.choices]
    whole = [tokenizer(text).input_ids for text in texts]
    starts = [len(tokenizer(item.context + choice.lead).input_ids) for choice in item.choices]
    shared = min(_common(whole), *starts)
    if shared < 1 or any(start >= len(ids) for start, ids in zip(starts, whole, strict=True)):
        raise DataError(f"{item.id} has an empty context or answer; leave it out")
    return Branched(item, whole[0][:shared], [ids[shared:] for ids in whole], [start - shared for start in starts])


def _common(sequences: list[list[int]]) -> int:
    """Return how many first tokens all sequences share."""
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def _packs(branched: Iterable[Branched]) -> Iterator[list[Branched]]:
    group: list[Branched] = []
    for one in branched:
        if group and sum(other.length for other in group) + one.length > PACK_TOKENS:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _score_pack(model: PreTrainedModel, group: list[Branched]) -> Iterator[dict[str, Any]]:
    """Run one pack and cut its likelihoods into items and choices again."""
    device = model.device
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predicts: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    for one in group:
        begin, shared = len(ids), len(one.prefix)
        ids += one.prefix
        positions += range(shared)
        for tokens, first in zip(one.branches, one.scored_from, strict=True):
            offset = len(ids)
            ids += tokens[:-1]
            positions += range(shared, shared + len(tokens) - 1)
            predicts += [offset + place - 1 if place else begin + shared - 1 for place in range(first, len(tokens))]
            targets += tokens[first:]
            counts.append(len(tokens) - first)
        segments.append(Segment(one.length, tree_mask(shared, [len(tokens) - 1 for tokens in one.branches]).to(device)))
    states = hidden_states(model, torch.tensor(ids, device=device), torch.tensor(positions, device=device), segments)
    scores, greedy = token_log_likelihoods(states[predicts], head_weight(model), torch.tensor(targets, device=device))
    parts = iter(zip(scores.split(counts), greedy.split(counts), strict=True))
    for one in group:
        yield _record(one.item, [next(parts) for _ in one.branches])


def _record(item: Item, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    return {
        "kind": "general",
        "id": item.id,
        "benchmark": item.benchmark,
        "gold": item.gold,
        "log_likelihoods": [round(float(scores.sum()), 6) for scores, _ in parts],
        "bytes": [len(choice.scored.encode()) for choice in item.choices],
        "greedy": [bool(greedy.all()) for _, greedy in parts],
    }
