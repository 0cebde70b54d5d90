"""Conversations to render, and what an example supervises."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipelines.config.data_section import DataSection
from pipelines.data.conversation import Conversation, Message, ParsedRow
from pipelines.data.rendering.example import Example
from pipelines.data.rendering.renderer import Renderer
from pipelines.data.rendering.templates import prepared_tokenizer
from pipelines.errors import DataError

QUESTION = "What is in drawer 4?"
ANSWER = "Blue pens."
NEXT_QUESTION = "And in the next one?"
NEXT_ANSWER = "It is empty."
TOOL = {"type": "function", "function": {"name": "open_drawer", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "open_drawer", "arguments": {"drawer": 4}}}


def talk(*contents: str, system: str | None = None, learn: str = "assistant") -> Conversation:
    """Return a conversation of a user and the assistant in turn; `learn` is a role, or `all`."""
    messages = []
    if system is not None:
        messages.append(Message("system", system, learn == "all"))
    for index, content in enumerate(contents):
        role = ("user", "assistant")[index % 2]
        messages.append(Message(role, content, learn in (role, "all")))
    return Conversation(tuple(messages))


def pair(prompt: str, completion: str) -> Conversation:
    messages = (Message("user", prompt), Message("assistant", completion, True))
    return Conversation(messages, is_pair=True)


def call_and_result(content: str = "") -> Conversation:
    """Return a question, a tool call, its result, and the answer."""
    return Conversation(
        (
            Message("user", QUESTION),
            Message("assistant", content, True, {"tool_calls": [CALL]}),
            Message("tool", "blue pens", fields={"name": "open_drawer"}),
            Message("assistant", ANSWER, True),
        ),
        tools=(TOOL,),
    )


def render(
    row: ParsedRow, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> tuple[Example, ...]:
    """Return the examples of a row, or raise why it cannot be learned."""
    section = DataSection.model_validate({"source": "rows", "max_tokens": 2000, **settings})
    prepared = prepared_tokenizer(tokenizer, section)
    [outcome] = Renderer(prepared, section).render([row])
    if isinstance(outcome, DataError):
        raise outcome
    return outcome


def render_one(row: ParsedRow, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Example:
    [example] = render(row, tokenizer, **settings)
    return example


def text_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def learned(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of the supervised parts."""
    tokens = zip(example.supervised, example.input_ids, strict=True)
    parts = []
    for is_supervised, part in groupby(tokens, key=lambda token: token[0]):
        if is_supervised:
            parts.append(text_of([token for _, token in part], tokenizer))
    return parts


def prompt_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    return text_of(example.input_ids[: example.prompt_tokens], tokenizer)


def applied(
    row: Conversation, tokenizer: PreTrainedTokenizerBase, *, count: int | None = None, **how: Any
) -> list[int]:
    """Return the tokens of the first `count` messages, as transformers renders them."""
    messages = [message.for_template() for message in row.messages[:count]]
    return list(tokenizer.apply_chat_template(messages, return_dict=False, **how))
