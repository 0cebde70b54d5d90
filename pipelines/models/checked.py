"""A model whose way of being read is verified on what it reads, before any number of it counts.

What is read first is verified first, and so is any example longer than those before it: a window shows itself only there.
Where a faster way no longer agrees, the model goes on by a slower one that does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipelines.models.equivalence import IN_16_BITS, TOLERANCES, Probe, verified_reader
from pipelines.models.forward import EAGER, SDPA, PackReader, attending_by
from pipelines.models.packs import Pack, join
from pipelines.models.support import why_not_packed
from pipelines.models.verified import Verified
from pipelines.runtime.memory import is_out_of_memory

FIRST_TOKENS = 3
"""Tokens of an answer that are compared before answers are written in batches."""


@dataclass(frozen=True)
class Generation:
    """How answers are written."""

    attention: str
    batched: bool
    """Several prompts at once, padded on the left; else one after the other."""


class CheckedReader:
    """Reads packs, each by a way that is verified for examples of its length."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.verified: Verified | None = None
        self._reader = PackReader.default(model)
        self._longest = {False: 0, True: 0}
        """Whether trees → tokens of the longest example that was verified."""
        self._generation: tuple[int, Generation] | None = None

    def log_likelihoods(self, pack: Pack, chunk_rows: int) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of each target in nats, and whether it is the likeliest token there."""
        self.check(pack)
        return self._reader.log_likelihoods(pack, chunk_rows)

    def logits(self, pack: Pack) -> Tensor:
        """Return the logits (N, V) in float32 of the positions that predict."""
        self.check(pack)
        return self._reader.logits(pack)

    def check(self, pack: Pack) -> None:
        """Verify the way of reading on an excerpt of a pack, where it holds a longer example than any before.

        Raises:
            BaseModelError: see `verified_reader`.
        """
        if pack.longest <= self._longest[pack.has_trees] or not len(pack.predicts):
            return
        reader, verified = verified_reader(self.model, [Probe(excerpt(pack))])
        self._longest[pack.has_trees] = pack.longest
        self._reader = reader if self.verified is None else _slower_of(self._reader, reader)
        self.verified = (
            verified if self.verified is None else _both(self.verified, verified, self._reader)
        )

    def generation(self, prompts: Sequence[list[int]]) -> Generation:
        """Return the fastest way of writing answers that begins each as the model's own forward does on the prompt alone.

        Args:
            prompts: tokens of each, at least one.
        """
        longest, shortest = max(prompts, key=len), min(prompts, key=len)
        if self._generation is None or len(longest) > self._generation[0]:
            self._generation = len(longest), self._way_of_writing([shortest, longest])
        return self._generation[1]

    @torch.inference_mode()
    def _way_of_writing(self, prompts: Sequence[list[int]]) -> Generation:
        if why_not_packed(self.model) is None:
            for attention in (SDPA, EAGER):
                try:
                    difference = self._difference_of_batch(prompts, attention)
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    continue  # a family that refuses an attention function or padding raises an error of its own
                if difference <= 10 * TOLERANCES.get(self.model.dtype, IN_16_BITS).loss:
                    return Generation(attention, batched=True)
        return Generation(EAGER, batched=False)

    def _difference_of_batch(self, prompts: Sequence[list[int]], attention: str) -> float:
        """Return how far the log-probabilities of the first tokens of a padded batch are from those of each prompt alone."""
        ids, mask = padded(prompts, filler=prompts[0][0], device=str(self.model.device))
        with attending_by(self.model, attention):
            output = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=FIRST_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=prompts[0][0],
                output_logits=True,
                return_dict_in_generate=True,
            )
        found = torch.stack(output.logits, dim=1).float().log_softmax(dim=2)
        written = output.sequences[:, ids.shape[1] : -1]
        differences = []
        with attending_by(self.model, EAGER):
            for prompt, tokens, row in zip(prompts, written, found, strict=True):
                whole = torch.cat([torch.tensor(prompt, device=tokens.device), tokens])
                own = self.model(input_ids=whole[None]).logits[0, len(prompt) - 1 :]
                differences.append(float((own.float().log_softmax(dim=1) - row).abs().max()))
        return max(value if value == value else float("inf") for value in differences)


def excerpt(pack: Pack) -> Pack:
    """Return a small pack of the same kind: its longest example, and two answers of its shortest tree or its shortest example."""
    pieces = [one for one in pack.pieces() if len(one.predicts)]
    longest, shortest = (
        max(pieces, key=lambda one: one.longest),
        min(pieces, key=lambda one: len(one.input_ids)),
    )
    if longest is shortest:
        return _some_answers(longest, 2)
    return join([_some_answers(longest, 1), _some_answers(shortest, 2)])


def padded(prompts: Sequence[list[int]], *, filler: int, device: str) -> tuple[Tensor, Tensor]:
    """Return prompts as one batch, padded on the left, and its mask, both (prompts, longest)."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor(
        [[filler] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
    )
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    return ids, mask


def _some_answers(piece: Pack, number: int) -> Pack:
    """Keep what the longest paths of a segment predict."""
    chosen = sorted(piece.paths(), key=lambda path: -len(path.places))[:number]
    return piece.only(torch.cat([path.rows for path in chosen]).sort().values)


def _slower_of(one: PackReader, other: PackReader) -> PackReader:
    """Return the path that avoids whatever either verification rejected."""
    return PackReader(
        one.model, one.packed and other.packed, None if one.head is None else other.head
    )


def _both(one: Verified, other: Verified, reader: PackReader) -> Verified:
    """Return what two verifications say together."""
    return replace(
        one,
        path=reader.path,
        own_head=reader.head is None,
        examples=one.examples + other.examples,
        longest=max(one.longest, other.longest),
        loss_difference=max(one.loss_difference, other.loss_difference),
        rejected=tuple(dict.fromkeys([*one.rejected, *other.rejected])),
        seconds=round(one.seconds + other.seconds, 3),
    )
