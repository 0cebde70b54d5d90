"""Text to tokens, and where a character of the text is among the tokens.

A text is always tokenized in one piece, as at inference: the tokens of two halves can differ from
the tokens of the text, and some tokenizers put a space before everything that they encode.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from pipelines.errors import DataError

NEAR = 32
"""Tokens before an answer in which a special token is searched."""
CACHED_TEXTS = 10_000


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text."""

    ids: list[int]
    offsets: list[tuple[int, int]] | None
    """First and end character of each token; None if the tokenizer does not report them."""


class SpecialTokens:
    """The special tokens of a tokenizer, and all that were added to its vocabulary, as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Collect the tokens; `eos` and `bos` are None if the tokenizer has none."""
        self.eos: str | None = tokenizer.eos_token
        self.bos: str | None = tokenizer.bos_token
        added_tokens = tokenizer.added_tokens_decoder.values()
        added = {str(token) for token in added_tokens}
        special = {str(token) for token in added_tokens if token.special}
        special |= set(map(str, tokenizer.all_special_tokens))
        self.ids = frozenset(token_id(text, tokenizer) for text in special if text)
        any_special = _any_of(special)
        any_added = _any_of(special | added)
        self.pattern = re.compile(any_special)
        self._added = re.compile(any_added)
        self._run = re.compile(f"(?:{any_special})+")
        self._added_run = re.compile(f"(?:{any_added})+")
        self._final_run = re.compile(rf"((?:{any_special})+)\s*\Z")
        self._next = re.compile(rf"\s*({any_added})")

    def first_run(self, text: str) -> tuple[int, int] | None:
        """Return where the first special tokens are that follow each other directly.

        Without any, the first added tokens: some tokenizers do not declare them as special.
        """
        found = self._run.search(text) or self._added_run.search(text)
        return found.span() if found else None

    def final_run(self, text: str) -> tuple[int, int] | None:
        """Return where the special tokens are with which a text ends, ignoring whitespace."""
        found = self._final_run.search(text)
        return found.span(1) if found else None

    def next_token(self, text: str, start: int) -> tuple[int, int] | None:
        """Return where the added token is that follows `start`, ignoring whitespace.

        Args:
            text: a rendering.
            start: a character of it.

        Returns:
            first character and end of the token; None if something else follows.
        """
        found = self._next.match(text, start)
        return found.span(1) if found else None

    def first_in(self, run: str) -> str:
        """Return the first added token of a text that has some."""
        return str(self._added.findall(run)[0])

    def last_in(self, run: str) -> str:
        """Return the last added token of a text that has some."""
        return str(self._added.findall(run)[-1])


class TextEncoder:
    """Encodes texts, and finds the tokens of their parts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens) -> None:
        """Wrap a tokenizer."""
        self._tokenizer = tokenizer
        self._special_ids = special.ids
        self._cache: dict[str, list[int]] = {}
        self.prefix = tokens_before_a_text(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Return the tokens of each text, without those that the tokenizer puts around a text."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=self._tokenizer.is_fast,
        )
        all_ids = encoded.input_ids
        all_offsets = encoded.get("offset_mapping") or [None] * len(all_ids)
        return list(map(Encoded, all_ids, all_offsets))

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def token_id(self, token: str) -> int:
        """Return the id of a token."""
        return token_id(token, self._tokenizer)

    def start_of(self, position: int, text: str, encoded: Encoded) -> int:
        """Return the number of tokens before the first one of an answer at `position`.

        A token that also covers the end of the prompt, such as the space before a word, belongs to
        the answer: without it, the answer's first word would not be learned.

        Args:
            position: the first character of the answer.
            text: prompt and answer.
            encoded: the tokens of `text`.

        Raises:
            DataError: a token covers the end of the prompt, and the tokenizer reports no offsets.
        """
        if self._prompt_has_same_tokens(position, text, encoded):
            return _tokens_before(position, encoded)
        prompt = self.ids(text[:position])
        common = common_length(prompt, encoded.ids)
        if common == len(prompt):
            return common
        if encoded.offsets is None:
            raise DataError(
                "has an answer whose first token also covers the end of its prompt, and the "
                "base's tokenizer does not report where tokens are; end the prompt without a space"
            )
        first = common
        while first < len(encoded.ids) and encoded.offsets[first][1] <= position:
            first += 1
        return first

    def end_of(self, position: int, text: str, encoded: Encoded) -> int:
        """Return the number of tokens before `position`, the end of an answer.

        Args:
            position: the first character after the answer.
            text: at least the prompt and the answer.
            encoded: the tokens of `text`.

        Raises:
            DataError: a token covers the end of the answer, and the tokenizer reports no offsets.
        """
        if encoded.offsets is not None:
            return _tokens_before(position, encoded)
        before = self.ids(text[:position])
        if common_length(before, encoded.ids) != len(before):
            raise DataError(
                "has an answer whose last token also covers what follows, and the base's "
                "tokenizer does not report where tokens are; use a fast tokenizer"
            )
        return len(before)

    def common_start(self, text: str, other: str) -> int:
        """Return the number of characters in the tokens that both texts start with.

        Args:
            text: a rendering.
            other: a rendering of other messages.
        """
        [encoded] = self.encode([text])
        count = common_length(encoded.ids, self.ids(other))
        if count == len(encoded.ids):
            return len(text)
        if encoded.offsets is None:
            return _character_of_token(count, text, encoded.ids, self)
        return encoded.offsets[count][0]

    def _prompt_has_same_tokens(self, position: int, text: str, encoded: Encoded) -> bool:
        """Return whether the prompt alone has the tokens it has here; False if that is not known.

        A special token separates what is before it from what is after it, so only the tokens from
        the last one need to be compared.
        """
        if encoded.offsets is None:
            return False
        end = _tokens_before(position, encoded)
        nearest = range(max(end - NEAR, 0), end)
        for index in reversed(nearest):
            if encoded.ids[index] in self._special_ids:
                tail_start, _ = encoded.offsets[index]
                tail = text[tail_start:position]
                return self._cached_ids(tail) == encoded.ids[index:end]
        return False

    def _cached_ids(self, text: str) -> list[int]:
        if text not in self._cache:
            if len(self._cache) >= CACHED_TEXTS:
                self._cache.clear()
            self._cache[text] = self.ids(text)
        return self._cache[text]


def _any_of(texts: Set[str]) -> str:
    """Return a regular expression of any of the texts but whitespace, the longest first."""
    visible = {text for text in texts if text.strip()}
    longest_first = sorted(visible, key=lambda text: (-len(text), text))
    return "|".join(re.escape(text) for text in longest_first) or r"(?!)"


def tokens_before_a_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before a text, such as its BOS.

    What it puts after a text, such as EOS, would end a prompt before its answer.
    """
    text = "a"
    complete = list(tokenizer(text).input_ids)
    alone = list(tokenizer(text, add_special_tokens=False).input_ids)
    for start in range(len(complete)):
        if complete[start : start + len(alone)] == alone:
            return complete[:start]
    return []


def token_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the number of items that both sequences start with.

    Args:
        one: text or tokens.
        other: of the same kind, of any length.
    """
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _tokens_before(position: int, encoded: Encoded) -> int:
    """Return the number of tokens that start before a character."""
    assert encoded.offsets is not None
    return bisect_left(encoded.offsets, position, key=lambda offset: offset[0])


def _character_of_token(count: int, text: str, ids: list[int], encoder: TextEncoder) -> int:
    """Return the first character of a token by encoding every start of the text."""
    for position in range(len(text) + 1):
        if encoder.ids(text[:position]) == ids[:count]:
            return position
    raise DataError(
        "has an answer that cannot be located: the base's tokenizer does not report where tokens "
        "are; use a fast tokenizer"
    )
