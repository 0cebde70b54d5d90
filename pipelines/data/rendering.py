"""Render a row to text: pieces that are supervised or not.

Supervised are all of a text, the completion of a prompt, and the assistant's turns of a
conversation.
"""

from reprlib import repr as truncated
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipelines.errors import DataError

Piece = tuple[str, bool]
"""A piece of text and whether it is supervised."""
Message = dict[str, str]


def render_row(
    row: dict[str, Any], shape: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, number: int
) -> list[Piece]:
    """Return the pieces of a row.

    Args:
        row: column → value.
        shape: the columns to read; see `pipelines.data.sources`.
        tokenizer: its chat template, if it has one, also renders prompt and completion.
        number: of the row, from 1, for error messages.

    Raises:
        DataError: a cell is empty or of the wrong type, or the chat template cannot render the row.
    """
    values = [row[name] for name in shape]
    for name, value in zip(shape, values, strict=True):
        _check_cell(name, value, number)
    end = str(tokenizer.eos_token or "")
    if shape == ("text",):
        return [(values[0] + end, True)]
    if shape == ("messages",):
        return _render_turns(values[0], tokenizer, number)
    prompt, completion = values
    if tokenizer.chat_template:
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
        return _render_turns(messages, tokenizer, number)
    return [(prompt, False), (completion + end, True)]


def _render_turns(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, number: int
) -> list[Piece]:
    """Render a conversation; only the assistant's text, up to its end mark, is supervised."""
    if not tokenizer.chat_template:
        raise DataError(
            "the rows are conversations but the base's tokenizer has no chat template; "
            "use prompt and completion instead"
        )
    _check_messages(messages, number)
    pieces: list[Piece] = []
    done = ""
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = _apply_template(tokenizer, messages[:index], number, opens_answer=True)
        after = _apply_template(tokenizer, messages[: index + 1], number)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"row {number}: the chat template rewrites earlier turns, so its answers cannot "
                "be located; use prompt and completion"
            )
        answer = _up_to_end_mark(after[len(before) :], str(tokenizer.eos_token))
        pieces += [(before[len(done) :], False), (answer, True)]
        done = before + answer
    if not pieces:
        raise DataError(
            f"row {number} has no message of role 'assistant', so it has nothing to learn from; "
            "add an answer or remove the row"
        )
    return pieces


def _up_to_end_mark(text: str, end: str) -> str:
    """Return the text up to the last end mark, inclusive; all of it if there is none."""
    answer, mark, _ = text.rpartition(end)
    return answer + mark if mark else text


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    number: int,
    *,
    opens_answer: bool = False,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opens_answer
        )
    except (TypeError, ValueError, TemplateError) as error:
        raise DataError(
            f"row {number} does not fit the base's chat template ({error}); fix or remove it"
        ) from error
    return str(text)


def _check_cell(name: str, value: Any, number: int) -> None:
    """Raise DataError if a cell is empty or does not have the type of its column."""
    if value in (None, "", []):
        raise DataError(f"row {number} has an empty {name}; fill or remove it")
    expected: type = list if name == "messages" else str
    words = "a list of role and content" if name == "messages" else "text"
    if not isinstance(value, expected):
        raise DataError(
            f"row {number} has {truncated(value)} as its {name}, which must be {words}; "
            "fix or remove the row"
        )


def _check_messages(messages: list[Any], number: int) -> None:
    """Raise DataError if a conversation starts with an answer or has an answer without text."""
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(
                f"row {number} has {truncated(message)} among its messages; "
                "each message must have a role and a content"
            )
        if message.get("role") != "assistant":
            continue
        if index == 0:
            raise DataError(
                f"row {number} starts with the assistant, so the answer has no question; "
                "put a message of role 'user' before it"
            )
        content = message.get("content")
        if not isinstance(content, str) or not content:
            raise DataError(
                f"row {number} has {truncated(content)} as the content of an assistant's turn, "
                "which must be text; fill it or remove the row"
            )
