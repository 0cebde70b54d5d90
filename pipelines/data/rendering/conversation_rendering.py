"""Render many conversations: by a known layout if they have one, otherwise each exactly."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.data.conversation import Conversation, Message
from pipelines.data.rendering.answers import AnswerLocator
from pipelines.data.rendering.layouts import (
    Layout,
    RenderCache,
    has_plain_messages,
    layout_of,
    placeholders,
)
from pipelines.data.rendering.templates import ChatTemplate
from pipelines.data.rendering.tool_rendering import (
    check_results,
    check_tools,
    with_readable_arguments,
)
from pipelines.data.rendering.turns import Rendering, find_turns
from pipelines.errors import DataError
from pipelines.runtime.stage import digest

LayoutKey = tuple[tuple[str, bool], ...]
"""Role of each message, and whether it is supervised."""


class _RenderedMessages:
    """The renderings of one conversation, each made once."""

    def __init__(self, template: ChatTemplate, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._template = template
        self._tools = tools
        self._texts: dict[tuple[tuple[int, ...], bool], str] = {}
        self._rendered = list[Sequence[Message]]()
        """Keeps the messages alive, so that no other message can get the id of one."""

    def __call__(self, messages: Sequence[Message], opens_answer: bool) -> str:
        """Return the text of messages."""
        ids = tuple(id(message) for message in messages)
        key = (ids, opens_answer)
        if key not in self._texts:
            text = self._template.render(messages, self._tools, opens_answer=opens_answer)
            self._texts[key] = text
            self._rendered.append(messages)
        return self._texts[key]


class ConversationRenderer:
    """Renders conversations with one chat template."""

    def __init__(self, template: ChatTemplate, locator: AnswerLocator) -> None:
        """Use a template and what locates its answers."""
        self._template = template
        self._locator = locator
        self._render_placeholders = RenderCache(self._render_plain)
        self._layouts: dict[LayoutKey, list[Layout]] = {}
        self._rendered_tools = set[str]()

    def render(self, conversations: Sequence[Conversation]) -> list[list[Rendering] | DataError]:
        """Return the renderings of each conversation, or why it cannot be learned.

        Args:
            conversations: of any roles; those of the same roles share a layout.

        Returns:
            one outcome for each conversation, in order.
        """
        layouts = [self._layouts_of(one) for one in conversations]
        wanted = list[Sequence[Message]]()
        for conversation, known in zip(conversations, layouts, strict=True):
            wanted += [conversation.messages[: one.rendering.messages] for one in known]
        sources = iter(self._template.render_many(wanted))
        outcomes = list[list[Rendering] | DataError]()
        for conversation, known in zip(conversations, layouts, strict=True):
            filled = [_fill(one, conversation, next(sources)) for one in known]
            complete = [rendering for rendering in filled if rendering is not None]
            if complete and len(complete) == len(filled):
                outcomes.append(complete)
            else:
                outcomes.append(self._find(conversation))
        return outcomes

    def render_exactly(self, conversation: Conversation) -> list[Rendering]:
        """Return the renderings of one conversation, found in its own renderings.

        Raises:
            DataError: it cannot be learned as written.
        """
        tools = conversation.tools
        render = _RenderedMessages(self._template, tools)
        messages = with_readable_arguments(conversation.messages, render)
        if tools is not None:
            self._check_tools(messages, tools)
        check_results(messages, render)
        return find_turns(messages, render, self._locator)

    def _find(self, conversation: Conversation) -> list[Rendering] | DataError:
        try:
            return self.render_exactly(conversation)
        except DataError as error:
            return error

    def _layouts_of(self, conversation: Conversation) -> list[Layout]:
        """Return the layouts of a conversation's renderings; none if they are not known."""
        messages = conversation.messages
        if conversation.tools is not None or not has_plain_messages(messages):
            return []
        key = tuple((message.role, message.supervised) for message in messages)
        if key not in self._layouts:
            self._layouts[key] = self._find_layouts(messages)
        return self._layouts[key]

    def _find_layouts(self, messages: Sequence[Message]) -> list[Layout]:
        examples = placeholders(messages)
        try:
            renderings = find_turns(examples, self._render_placeholders, self._locator)
        except DataError:
            return []
        layouts = [layout_of(rendering, examples) for rendering in renderings]
        found = [layout for layout in layouts if layout is not None]
        return found if len(found) == len(layouts) else []

    def _render_plain(self, messages: Sequence[Message], opens_answer: bool) -> str:
        return self._template.render(messages, opens_answer=opens_answer)

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        key = digest(list(tools))
        if key not in self._rendered_tools:
            check_tools(messages, tools, self._template)
            self._rendered_tools.add(key)


def _fill(layout: Layout, conversation: Conversation, source: str | None) -> Rendering | None:
    if source is None:
        return None
    return layout.fill(conversation.messages, source)
