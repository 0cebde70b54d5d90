"""Check that a rendered conversation contains what the row has.

A template can drop a system message, the reasoning of an answer, or the text next to a tool call.
Such a row is refused: the model would learn something other than what was written.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from reprlib import repr as truncated
from typing import Any

from pipelines.data.conversation import Message
from pipelines.errors import DataError

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields of an answer that have its reasoning."""
LONGEST_TAG = 100
TAG = r"(?:<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷\s]+▷)"
"""Regular expression of a tag, such as `<think>` or `[/THINK]`."""
_EMPTY_BLOCK = re.compile(rf"\s*({TAG})\s*({TAG})\s*")
_BLOCK = re.compile(rf"\s*({TAG})(.*?)({TAG})(.*)", re.DOTALL)
_OPEN_TAG = re.compile(rf"({TAG})\s*\Z")


def find_empty_block(text: str, position: int) -> tuple[int, int] | None:
    """Return where an empty block, such as `<think></think>`, around or after `position` ends.

    The opening tag can be before the position: some templates write it in the generation prompt.

    Args:
        text: a rendering.
        position: a character of it, where an answer starts.

    Returns:
        The end of the closing tag, and the end of the whitespace after it; None if there is no
        block.
    """
    for start in (position, opening_tag_start(text, position)):
        found = _EMPTY_BLOCK.match(text, start)
        if found and found.end(2) > position and _is_pair(found[1], found[2]):
            return found.end(2), found.end()
    return None


def opening_tag_start(text: str, position: int) -> int:
    """Return where the tag starts that a prompt ends with, such as `<think>`; else `position`.

    Args:
        text: a rendering.
        position: the end of a prompt in it.
    """
    opening = _OPEN_TAG.search(text, max(position - LONGEST_TAG, 0), position)
    return opening.start() if opening else position


def starts_with_tag(content: str) -> bool:
    """Return whether a content may start with a block, such as `<think>…</think>`."""
    return content.lstrip().startswith(("<", "[", "◁"))


def check_context(messages: Sequence[Message], text: str) -> None:
    """Raise DataError unless the system's and the user's messages are in the rendering.

    Args:
        messages: of the conversation.
        text: its rendering.

    Raises:
        DataError: the template drops or changes one of them, or prints it as a Python object.
    """
    for message in messages:
        if message.role not in ("system", "user"):
            continue
        printed = f"'content': {message.content!r}"
        if message.content.strip() not in text or printed in text:
            raise DataError(
                f"has the {message.role} message {truncated(message.content)}, which the chat "
                "template does not render as written; move it to a message that is rendered, or "
                "set another data.chat_template"
            )


def check_answer(message: Message, answer: str) -> None:
    """Raise DataError unless a rendered answer contains everything that the message has.

    Args:
        message: of the assistant.
        answer: its rendering, with the tag of its block that the generation prompt may write.

    Raises:
        DataError: a part of the message is not in the rendering.
    """
    position = 0
    for piece in _content_pieces(message.content):
        position = answer.find(piece, position)
        if position < 0:
            raise _dropped("content", message.content)
        position += len(piece)
    for name in REASONING:
        value = message.fields.get(name)
        if isinstance(value, str) and value.strip() not in answer:
            raise _dropped(name, value)
    for call in message.fields.get("tool_calls") or ():
        for value in _leaves(call.get("function", call)):
            if not any(form in answer for form in _forms(value)):
                raise _dropped("tool_calls", value)


def _is_pair(opening: str, closing: str) -> bool:
    """Return whether the second tag closes the first."""
    if opening == closing:
        return False
    forms = {
        closing.replace("/", "", 1),
        closing.replace("END", "START"),
        closing.replace("END", "BEGIN"),
        closing.replace("end", "start"),
        closing.replace("end", "begin"),
    }
    return opening in forms


def _content_pieces(content: str) -> list[str]:
    """Return the texts that a rendering must contain in this order, without outer whitespace.

    Templates change the whitespace around a block with the reasoning.
    """
    block = _BLOCK.fullmatch(content)
    pieces: Sequence[str] = (content,)
    if block and _is_pair(block[1], block[3]):
        pieces = block.groups()
    return [piece.strip() for piece in pieces]


def _leaves(function: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the name of a called function, and the names and values of its arguments."""
    yield function.get("name", "")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            yield arguments
            return
    yield from _values_in(arguments)


def _values_in(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from _values_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _values_in(item)
    elif value is not None:
        yield value


def _forms(value: Any) -> tuple[str, ...]:
    """Return how a value can be written: as it is, or as JSON."""
    if not isinstance(value, str):
        return (json.dumps(value), str(value))
    return (value.strip(), json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])


def _dropped(name: str, value: Any) -> DataError:
    return DataError(
        f"has {truncated(value)} in the {name} of an answer, but the chat template drops {name} of "
        "the answer or changes it; write it as the template expects, or set another "
        "data.chat_template"
    )
