"""What a row is before it is rendered: a conversation, or plain text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.config.data_section import RoleName


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: RoleName
    content: str
    """Exactly as in the row; the texts of several parts are joined. Empty only for an assistant's
    turn with tool calls and for the result of a tool."""
    supervised: bool = False
    """The tokens of this turn are learned, up to and including the token that ends it."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else the chat template receives, such as tool_calls, name or reasoning_content."""

    def for_template(self) -> dict[str, Any]:
        """Return the message in the form that chat templates expect."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True)
class Conversation:
    """A conversation with at least one supervised turn."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    """JSON schemas of the tools that the assistant can call."""
    is_pair: bool = False
    """It was one prompt and one completion: without a chat template, one text follows the other."""


@dataclass(frozen=True)
class PlainText:
    """A text; all of it is supervised."""

    text: str


ParsedRow = Conversation | PlainText
