"""A tokenized example: its token ids and, for every token, whether it is supervised."""

from dataclasses import dataclass, replace

from pipelines.data.notes import Note


@dataclass(frozen=True)
class Example:
    """One tokenized row, or one answer of a row."""

    input_ids: list[int]
    supervised: list[bool]
    """True if the token is supervised; aligned with input_ids."""
    prompt_tokens: int
    """Tokens before the last supervised answer: generation starts from them. If truncation removed
    some of them, the number exceeds the length of `input_ids` and nothing is generated. 0 if the
    row has no prompt."""
    reference: str
    """The last supervised answer exactly as in the row, or the text."""
    group: str
    """Digest of the start of the conversation, up to and including the first user message, or of
    the text."""
    was_cut: bool
    """The row is longer than max_tokens."""
    end_token: int | None
    """Id of the token that ends the last supervised turn."""
    notes: tuple[Note, ...]


def truncate(example: Example, max_tokens: int) -> Example:
    """Return the example with its first `max_tokens` tokens.

    Args:
        example: of any length.
        max_tokens: at least 1.
    """
    return replace(
        example,
        input_ids=example.input_ids[:max_tokens],
        supervised=example.supervised[:max_tokens],
    )
