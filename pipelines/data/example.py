"""A tokenized example: its token ids and, for every token, whether it is supervised."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipelines.data.rendering import Piece


@dataclass(frozen=True)
class Example:
    """One tokenized row."""

    input_ids: list[int]
    supervised: list[bool]
    """True if the token is supervised; aligned with input_ids."""
    prompt_tokens: int
    """Tokens before the last supervised piece: generation starts from them. If truncation removed
    some of them, the number exceeds the length of `input_ids` and nothing is generated."""
    reference: str
    """The text of the last supervised piece."""
    group: str
    was_cut: bool


def build_example(
    pieces: list[Piece], tokenizer: PreTrainedTokenizerBase, *, group: str, max_tokens: int
) -> Example:
    """Tokenize the pieces of a row and truncate them on the right to `max_tokens`."""
    # A chat template writes the beginning-of-text mark itself.
    input_ids = [] if tokenizer.chat_template else list(tokenizer("").input_ids)
    supervised = [False] * len(input_ids)
    prompt_tokens = 0
    for text, is_supervised in pieces:
        if is_supervised:
            prompt_tokens = len(input_ids)
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        input_ids += tokens
        supervised += [is_supervised] * len(tokens)
    supervised[0] = False  # no earlier token can predict the first one
    last_text = pieces[-1][0]
    return Example(
        input_ids[:max_tokens],
        supervised[:max_tokens],
        prompt_tokens,
        reference=last_text.removesuffix(str(tokenizer.eos_token or "")).strip(),
        group=group,
        was_cut=len(input_ids) > max_tokens,
    )
