"""Render many conversations with one call of the template each.

Where the answers are depends only on the roles of the messages, for most templates. That layout is
found once, with placeholders as contents. A conversation is then rendered once, and has the layout
if its rendering is that of the placeholders with its own contents; otherwise its answers have to
be found in its own renderings.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from pipelines.data.conversation import Message
from pipelines.data.rendering.answers import Render, Span
from pipelines.data.rendering.containment import starts_with_tag
from pipelines.data.rendering.turns import Rendering

CACHED_RENDERINGS = 2000
RenderKey = tuple[tuple[str, ...], tuple[str, ...], bool]
"""Roles and contents of messages, and whether what opens an answer follows."""


@dataclass(frozen=True)
class Place:
    """A character of a literal."""

    literal: int
    """Number of the literal."""
    offset: int
    """Characters before it in the literal."""

    def position(self, starts: Sequence[int]) -> int:
        """Return the position in a text whose literals start at `starts`."""
        return starts[self.literal] + self.offset


@dataclass(frozen=True)
class Layout:
    """A rendering with placeholders: literals between contents."""

    order: tuple[int, ...]
    """Indices of the messages, in the order of their contents in the text."""
    literals: tuple[str, ...]
    """What the template writes before each content, and after the last one."""
    tail: str
    """What is tokenized instead of the last literal."""
    spans: tuple[tuple[Place, Place], ...]
    """Where supervised parts start and end."""
    prompt: Place
    rendering: Rendering
    """Of the placeholders."""

    def fill(self, messages: Sequence[Message], source: str) -> Rendering | None:
        """Return the rendering of messages, or None if `source` does not have this layout.

        Args:
            messages: of the roles that the layout was found with.
            source: what the template writes for them.
        """
        contents = [messages[index].content for index in self.order]
        stripped = [content.strip() for content in contents]
        notes = self.rendering.notes
        has_tag = any(starts_with_tag(content) for content in contents)
        if "empty thinking" in notes and has_tag:
            return None  # it may have a block itself
        if "other generation prompt" in notes and contents != stripped:
            return None  # outer whitespace can change the tokens that prompt and answer share
        for values in (contents, stripped):
            body, starts = self._body(values)
            if body + self.literals[-1] == source:
                return self._rendering(messages, body + self.tail, starts, source)
        return None

    def _body(self, contents: Sequence[str]) -> tuple[str, list[int]]:
        """Return the text without the last literal, and where each literal starts."""
        pieces = list[str]()
        starts = [0]
        length = 0
        for literal, content in zip(self.literals, contents, strict=False):
            pieces += (literal, content)
            length += len(literal) + len(content)
            starts.append(length)
        return "".join(pieces), starts

    def _rendering(
        self, messages: Sequence[Message], text: str, starts: Sequence[int], source: str
    ) -> Rendering:
        spans = list[Span]()
        for first, end in self.spans:
            spans.append((first.position(starts), end.position(starts)))
        return replace(
            self.rendering,
            text=text,
            spans=tuple(spans),
            prompt=self.prompt.position(starts),
            reference=self._reference(messages),
            source=source,
        )

    def _reference(self, messages: Sequence[Message]) -> str:
        """Return the content of the last answer; empty if none can be prompted."""
        if not self.rendering.reference:
            return ""
        rendered = messages[: self.rendering.messages]
        answers = [message.content for message in rendered if message.role == "assistant"]
        return answers[-1]


def has_plain_messages(messages: Sequence[Message]) -> bool:
    """Return whether a template can only insert the contents of these messages."""
    return all(message.content and not message.fields for message in messages)


def placeholders(messages: Sequence[Message]) -> list[Message]:
    """Return messages of the same roles with contents that occur nowhere else."""
    return [replace(message, content=_placeholder(index)) for index, message in enumerate(messages)]


@cache
def _placeholder(index: int) -> str:
    """Return a text with characters that a template might escape."""
    return f"qz{index:05}\n'{index:05}jx"


def layout_of(rendering: Rendering, messages: Sequence[Message]) -> Layout | None:
    """Return the layout of placeholders, or None if they are not all there exactly once.

    Args:
        rendering: of the placeholders, with its spans.
        messages: the placeholders.
    """
    source = rendering.source
    contents = [message.content for message in messages[: rendering.messages]]
    if any(source.count(content) != 1 for content in contents):
        return None
    positions = [source.index(content) for content in contents]
    order = sorted(range(len(contents)), key=positions.__getitem__)
    literals = list[str]()
    starts = list[int]()
    end = 0
    for index in order:
        starts.append(end)
        literals.append(source[end : positions[index]])
        end = positions[index] + len(contents[index])
    starts.append(end)
    literals.append(source[end:])

    prompt = _place(rendering.prompt, starts, literals)
    spans = _places_of_spans(rendering.spans, starts, literals)
    if prompt is None or spans is None:
        return None
    return Layout(
        order=tuple(order),
        literals=tuple(literals),
        tail=rendering.text[end:],
        spans=tuple(spans),
        prompt=prompt,
        rendering=rendering,
    )


def _places_of_spans(
    spans: Sequence[Span], starts: Sequence[int], literals: Sequence[str]
) -> list[tuple[Place, Place]] | None:
    """Return where spans start and end; None if one of these characters is in a content."""
    found = list[tuple[Place, Place]]()
    for first, end in spans:
        first_place = _place(first, starts, literals)
        end_place = _place(end, starts, literals)
        if first_place is None or end_place is None:
            return None
        found.append((first_place, end_place))
    return found


def _place(position: int, starts: Sequence[int], literals: Sequence[str]) -> Place | None:
    """Return which literal has a character; None if it is in a content."""
    number = bisect_left(starts, position + 1) - 1
    offset = position - starts[number]
    is_last = number == len(literals) - 1
    if offset > len(literals[number]) and not is_last:
        return None
    return Place(number, offset)


class RenderCache:
    """Renders placeholders; conversations that start with the same roles have the same ones."""

    def __init__(self, render: Render) -> None:
        """Wrap a function that renders."""
        self._render = render
        self._texts: dict[RenderKey, str] = {}

    def __call__(self, messages: Sequence[Message], opens_answer: bool) -> str:
        """Return the rendering of messages that have no fields."""
        roles = tuple(message.role for message in messages)
        contents = tuple(message.content for message in messages)
        key = (roles, contents, opens_answer)
        if key not in self._texts:
            if len(self._texts) >= CACHED_RENDERINGS:
                self._texts.clear()
            self._texts[key] = self._render(messages, opens_answer)
        return self._texts[key]
