"""A model whose reader is verified on what it reads, before any of its numbers count.

The first pack is verified first, and so is any example longer than those before it: only a longer
example shows a window. If a faster reader no longer agrees, the model continues with a slower one
that does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel

from pipelines.models.equivalence import combined, verified_reader
from pipelines.models.forward import EAGER, SDPA, PackReader, attending_by
from pipelines.models.measurement import Probe
from pipelines.models.packs import Pack, join
from pipelines.models.support import why_not_packed
from pipelines.models.tolerances import tolerance_of
from pipelines.runtime.interfaces.verified import Verified
from pipelines.runtime.memory import is_out_of_memory

FIRST_TOKENS = 3
"""Tokens of an answer that are compared before answers are generated in batches."""


@dataclass(frozen=True)
class Generation:
    """How answers are generated."""

    attention: str
    batched: bool
    """Several prompts at once, padded on the left; else one after the other."""


class Architecture(BaseModel, extra="forbid"):
    """What has been verified of models with one config and one kind of weights.

    Windows, chunks and positions depend on the config and on the length of an example, not on the
    values of the weights. A second model of the same architecture is therefore verified on short
    examples only, up to the length that the first one was verified on.
    """

    longest: dict[bool, int] = {False: 0, True: 0}
    """Whether a pack has trees → tokens of the longest example that was verified."""
    is_packed: bool = True
    """Whether no verification rejected reading packs."""
    has_linear_head: bool = True
    """Whether no verification rejected the head in closed form."""

    def record(self, reader: PackReader, pack: Pack) -> None:
        """Record that a reader was verified on examples as long as those of a pack.

        Args:
            reader: the one that agreed with the model's own forward.
            pack: on which it was verified.
        """
        self.is_packed = self.is_packed and reader.packed
        self.has_linear_head = self.has_linear_head and reader.head is not None
        self.longest[pack.has_trees] = max(self.longest[pack.has_trees], pack.longest)

    def limited(self, reader: PackReader) -> PackReader:
        """Return a reader that avoids whatever any verification rejected."""
        head = reader.head if self.has_linear_head else None
        return PackReader(reader.model, reader.packed and self.is_packed, head)


class CheckedReader:
    """Reads packs, each with a reader that is verified for examples of its length."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture | None = None) -> None:
        """Read with a model; `architecture` is what is known of models like it."""
        self.model = model
        self._architecture = Architecture() if architecture is None else architecture
        self.verified: Verified | None = None
        self._reader = PackReader.default(model)
        self._longest = {False: 0, True: 0}
        """Whether a pack has trees → tokens of the longest example that was verified."""
        self._generation: Generation | None = None
        self._generation_tokens = 0
        """Tokens of the longest prompt for which `_generation` was verified."""

    def log_likelihoods(self, pack: Pack, chunk_rows: int) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of each target in nats, and whether it is the likeliest.

        Args:
            pack: with N targets; see `check`.
            chunk_rows: number of positions whose logits exist at the same time.

        Returns:
            (N,) float32 and (N,) bool.

        Raises:
            BaseModelError: see `verified_reader`.
        """
        self.check(pack)
        return self._reader.log_likelihoods(pack, chunk_rows)

    def logits(self, pack: Pack) -> Tensor:
        """Return the logits (N, V) in float32 of the positions that predict.

        Args:
            pack: with N targets; see `check`.

        Raises:
            BaseModelError: see `verified_reader`.
        """
        self.check(pack)
        return self._reader.logits(pack)

    def check(self, pack: Pack) -> None:
        """Verify the reader on an excerpt of a pack with a longer example than any before.

        Raises:
            BaseModelError: see `verified_reader`.
        """
        trees = pack.has_trees
        has_targets = len(pack.predicts) > 0
        if pack.longest <= self._longest[trees] or not has_targets:
            return
        known = self._architecture.longest[trees]
        is_known = pack.longest <= known
        if is_known and self.verified is not None:  # this model's weights are read as verified
            self._longest[trees] = known
            return
        sample = shortest(pack) if is_known else excerpt(pack)
        reader, verified = verified_reader(self.model, [Probe(sample)])
        self._longest[trees] = known if is_known else pack.longest
        self._architecture.record(reader, sample)
        self._reader = self._architecture.limited(reader)
        if self.verified is not None:
            seconds = round(self.verified.seconds + verified.seconds, 3)
            together = combined([self.verified, verified])
            verified = together.model_copy(update={"seconds": seconds})
        own_head = self._reader.head is None
        used = {"path": self._reader.path, "own_head": own_head}
        self.verified = verified.model_copy(update=used)

    def generation(self, prompts: Sequence[list[int]]) -> Generation:
        """Return the fastest way to generate that starts each answer as the own forward does.

        The own forward reads each prompt alone.

        Args:
            prompts: tokens of each, at least one.
        """
        longest = max(prompts, key=len)
        shortest = min(prompts, key=len)
        if self._generation is None or len(longest) > self._generation_tokens:
            self._generation = self._verified_generation([shortest, longest])
            self._generation_tokens = len(longest)
        return self._generation

    @torch.inference_mode()
    def _verified_generation(self, prompts: Sequence[list[int]]) -> Generation:
        slow = Generation(EAGER, batched=False)
        if why_not_packed(self.model) is not None:
            return slow
        tolerance = 10 * tolerance_of(self.model.dtype).loss
        for attention in (SDPA, EAGER):
            try:
                difference = self._batch_difference(prompts, attention)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                continue  # a family that refuses an attention function or padding raises any error
            if difference <= tolerance:
                return Generation(attention, batched=True)
        return slow

    def _batch_difference(self, prompts: Sequence[list[int]], attention: str) -> float:
        """Compare the first tokens of a padded batch with each prompt alone.

        Returns:
            The largest difference of a log-probability; infinity if one is not a number.
        """
        with attending_by(self.model, attention):
            generated, found = self._generate_batch(prompts)
        differences = []
        with attending_by(self.model, EAGER):
            for prompt, tokens, log_probabilities in zip(prompts, generated, found, strict=True):
                own = self._own_log_probabilities(prompt, tokens)
                distances = (own - log_probabilities).abs()
                difference = float(distances.max())
                if math.isnan(difference):
                    return math.inf
                differences.append(difference)
        return max(differences)

    def _generate_batch(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Generate `FIRST_TOKENS` tokens per prompt.

        Returns:
            All of them but the last, (prompts, FIRST_TOKENS - 1), and the log-probabilities of each
            step, (prompts, FIRST_TOKENS, V).
        """
        filler = prompts[0][0]
        ids, mask = padded(prompts, filler=filler, device=str(self.model.device))
        output = self.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=FIRST_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=filler,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(output.logits, dim=1)
        generated = output.sequences[:, ids.shape[1] : -1]
        return generated, logits.float().log_softmax(dim=2)

    def _own_log_probabilities(self, prompt: list[int], generated: Tensor) -> Tensor:
        """Return log-probabilities (generated + 1, V) after a prompt, by the own forward."""
        start = torch.tensor(prompt, device=generated.device)
        ids = torch.cat([start, generated])
        logits: Tensor = self.model(input_ids=ids[None]).logits[0]
        after_prompt = logits[len(prompt) - 1 :]
        return after_prompt.float().log_softmax(dim=1)


def excerpt(pack: Pack) -> Pack:
    """Return a small pack of the same kind.

    It holds the longest example, and the shortest example or two answers of the shortest tree.
    """
    pieces = [piece for piece in pack.pieces() if len(piece.predicts)]
    longest = max(pieces, key=lambda piece: piece.longest)
    shortest = min(pieces, key=lambda piece: len(piece.input_ids))
    if longest is shortest:
        return _some_answers(longest, 2)
    return join([_some_answers(longest, 1), _some_answers(shortest, 2)])


def shortest(pack: Pack) -> Pack:
    """Return the shortest example of a pack, or two answers of its shortest tree."""
    pieces = [piece for piece in pack.pieces() if len(piece.predicts)]
    smallest = min(pieces, key=lambda piece: len(piece.input_ids))
    return _some_answers(smallest, 2)


def padded(prompts: Sequence[list[int]], *, filler: int, device: str) -> tuple[Tensor, Tensor]:
    """Return prompts as one batch, padded on the left, and its mask, both (prompts, longest).

    Args:
        prompts: tokens of each, at least one prompt.
        filler: token id of the padding, which the mask hides.
        device: of both tensors.
    """
    width = max(map(len, prompts))
    shape = (len(prompts), width)
    ids = torch.full(shape, filler)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt)
        ids[row, start:] = torch.tensor(prompt)
        mask[row, start:] = 1
    return ids.to(device), mask.to(device)


def _some_answers(piece: Pack, number: int) -> Pack:
    """Keep the predictions on the longest paths of a segment."""
    longest_first = sorted(piece.paths(), key=lambda path: -len(path.places))
    chosen = longest_first[:number]
    rows = torch.cat([path.rows for path in chosen])
    return piece.only(rows.sort().values)
