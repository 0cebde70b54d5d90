"""Where one answer is in the rendering of a conversation that ends with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.data.conversation import Message
from pipelines.data.notes import Note
from pipelines.data.rendering.containment import (
    check_answer,
    find_empty_block,
    opening_tag_start,
    starts_with_tag,
)
from pipelines.data.rendering.endings import Ending, find_ending
from pipelines.data.rendering.templates import ChatTemplate
from pipelines.data.rendering.token_positions import SpecialTokens, TextEncoder, common_length
from pipelines.errors import DataError

Span = tuple[int, int]
"""The first character and the end of a part of a text."""
Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether to write what opens an answer → text."""
PROBE = "qzkvjx"


@dataclass(frozen=True)
class LocatedAnswer:
    """One assistant's turn in the rendering that ends with it."""

    index: int
    """Of its message."""
    source: str
    """The rendering of all messages through this one."""
    start: int
    """Where the model starts to generate."""
    body: int
    """Where the row's text ends."""
    closing: str
    """What follows the row's text, up to and including the end token."""
    end: str
    """The end token."""
    is_closed: bool
    """The rendering contains the end token; otherwise it has to be appended."""
    notes: tuple[Note, ...]

    @property
    def text(self) -> str:
        """The rendering, to which the end token is to be appended if it is not closed."""
        if self.is_closed:
            return self.source
        return self.source[: self.body] + self.closing.removesuffix(self.end)


class AnswerLocator:
    """Locates answers, for one chat template."""

    def __init__(
        self,
        template: ChatTemplate,
        encoder: TextEncoder,
        special: SpecialTokens,
        *,
        supervise_empty_thinking: bool,
    ) -> None:
        """Use a template and the tokenizer that belongs to it."""
        self._template = template
        self._encoder = encoder
        self._special = special
        self._supervise_empty_thinking = supervise_empty_thinking

    @cached_property
    def ending(self) -> Ending | None:
        """How the template ends an answer; None if it cannot be determined."""
        return find_ending(self._template, self._special)

    def locate(self, messages: Sequence[Message], index: int, render: Render) -> LocatedAnswer:
        """Return where the answer at `index` is.

        Args:
            messages: of a conversation.
            index: of the assistant's message.
            render: renders some of the messages.

        Raises:
            DataError: it cannot be located, or the template does not render all of it.
        """
        message = messages[index]
        before = messages[:index]
        through = messages[: index + 1]
        source = render(through, False)
        start, start_notes = self._start(before, source, render)
        body, closing = self._body_and_closing(message, source, start)
        first_tag = opening_tag_start(source, start)
        check_answer(message, source[first_tag:body])
        start, thinking_notes = self._skip_empty_thinking(message, source, start, body)
        is_closed = bool(closing)
        if not is_closed:
            body, closing = self._missing_closing(through, source, body, render)
        return LocatedAnswer(
            index=index,
            source=source,
            start=start,
            body=body,
            closing=closing,
            end=self._special.last_in(closing),
            is_closed=is_closed,
            notes=(*start_notes, *thinking_notes),
        )

    def last_span(self, answer: LocatedAnswer) -> Span:
        """Return where the answer is in its own text."""
        if not answer.is_closed or self._special.eos is None:
            return answer.start, len(answer.text)
        return answer.start, answer.body + len(answer.closing)

    def inner_span(self, answer: LocatedAnswer, text: str) -> Span | None:
        """Return where the answer is in the rendering of more messages.

        None if it, or what precedes it, differs there from what it is at inference, or if nothing
        ends it there.

        Args:
            answer: located in the rendering that ends with it.
            text: the rendering of the same and more messages.
        """
        body = answer.body
        if not text.startswith(answer.source[:body]):
            return None
        length = self.closing_length(text, body, answer.closing)
        if length == 0:
            return None
        end = body + length
        if self._special.eos is None:
            end = max(end, common_length(answer.source, text))
        return answer.start, end

    def closing_length(self, text: str, position: int, closing: str = "") -> int:
        """Return the length of what ends an earlier turn at a position; 0 if nothing does.

        Args:
            text: a rendering.
            position: a character of it, where a message's content ends.
            closing: what ends this turn in its own rendering, if that is known.
        """
        if closing and text.startswith(closing, position):
            return len(closing)
        inner = self.ending.inner_closing if self.ending else ""
        if inner and text.startswith(inner, position):
            return len(inner)
        return 0

    def _start(
        self, before: Sequence[Message], source: str, render: Render
    ) -> tuple[int, tuple[Note, ...]]:
        """Return where an answer starts: after its prompt, or after the tokens both share."""
        if not before:
            return self._start_of_greeting(source), ()
        prompt = render(before, True)
        if source.startswith(prompt):
            return len(prompt), ()
        start = self._encoder.common_start(source, prompt)
        if start < common_length(render(before, False), prompt):
            raise DataError(
                "has an answer that the chat template of the base renders after another history "
                "than its prompt, so it cannot be located; use prompt and completion with "
                "data.chat_template: none, or another template"
            )
        return start, ("other generation prompt",)

    def _start_of_greeting(self, source: str) -> int:
        """Return where an answer starts that no message precedes; it has no prompt."""
        opening = self.ending.opening if self.ending else ""
        if not opening or opening not in source:
            raise DataError(
                "starts with an answer of the assistant that is learned, which cannot be located: "
                "the chat template of the base writes nothing that opens an answer; set the weight "
                "of the message to 0, or put a message of role 'user' before it"
            )
        return source.index(opening) + len(opening)

    def _body_and_closing(self, message: Message, source: str, start: int) -> tuple[int, str]:
        """Return where the row's text ends, and what ends the turn; empty if nothing does."""
        ending = self.ending
        if ending and source.endswith(ending.tail):
            body = len(source) - len(ending.tail)
            # A call of a tool may end in another way than an answer of which nothing is the end.
            is_known = bool(ending.closing) or not message.fields.get("tool_calls")
            if body >= start and is_known:
                return body, ending.closing
        answer = source[start:]
        run = self._special.final_run(answer)
        if run is None:
            return len(source), ""
        first, end = run
        return start + first, answer[first:end]

    def _skip_empty_thinking(
        self, message: Message, source: str, start: int, body: int
    ) -> tuple[int, tuple[Note, ...]]:
        """Return where an answer starts after an empty thinking block that the template wrote."""
        block = find_empty_block(source, start)
        content_start = _content_start(message, source, body)
        if block is None or content_start is None:
            return start, ()
        tag_end, block_end = block
        if tag_end > content_start:
            return start, ()
        if self._supervise_empty_thinking:
            return start, ("empty thinking",)
        return min(block_end, content_start), ("empty thinking",)

    def _missing_closing(
        self, messages: Sequence[Message], source: str, body: int, render: Render
    ) -> tuple[int, str]:
        """Return where a turn without an end token ends, and what is to be appended.

        That is the special token with which the next turn starts, or else the tokenizer's EOS.
        """
        following = self._following(messages, source[:body], render)
        if following:
            return body, following
        if self._special.eos is None:
            raise DataError(
                "has an answer after which the chat template of the base writes no end token, and "
                "the tokenizer has none; set data.eos_token"
            )
        return max(body, len(source.rstrip())), self._special.eos

    def _following(self, messages: Sequence[Message], text: str, render: Render) -> str:
        """Return what follows an answer through the first special token; empty if none follows."""
        is_call = bool(messages[-1].fields.get("tool_calls"))
        if self.ending and not is_call:
            return self.ending.following
        continued = [*messages, *_next_messages(messages[-1])]
        try:
            longer = render(continued, False)
        except DataError:
            return ""
        if not longer.startswith(text):
            return ""
        token = self._special.next_token(longer, len(text))
        if token is None:
            return ""
        _, end = token
        return longer[len(text) : end]


def _content_start(message: Message, source: str, body: int) -> int | None:
    """Return the first character that can be from the row; None if that is not known."""
    if message.content and source.endswith(message.content, 0, body):
        return body - len(message.content)
    stripped = message.content.strip()
    before = source[:body].rstrip()
    if stripped and before.endswith(stripped):
        return len(before) - len(stripped)
    return None if starts_with_tag(message.content) else body


def _next_messages(message: Message) -> list[Message]:
    """Return messages that can follow an answer."""
    calls = message.fields.get("tool_calls") or ()
    results = [Message("tool", PROBE, fields=_result_fields(call)) for call in calls]
    return results or [Message("user", PROBE)]


def _result_fields(call: Mapping[str, Any]) -> dict[str, str]:
    function = call.get("function", {})
    return {"tool_call_id": call.get("id", ""), "name": function.get("name", "")}
