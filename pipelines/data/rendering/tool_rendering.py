"""Check that the chat template renders tools, their calls and their results."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from reprlib import repr as truncated
from typing import Any

from pipelines.data.conversation import Message
from pipelines.data.rendering.answers import PROBE, Render
from pipelines.data.rendering.containment import TAG
from pipelines.data.rendering.templates import ChatTemplate, Tools
from pipelines.errors import DataError


def check_tools(messages: Sequence[Message], tools: Tools, template: ChatTemplate) -> None:
    """Raise DataError if the template renders the same text without the tools.

    Args:
        messages: of the conversation.
        tools: JSON schemas of its tools.
        template: of the base.

    Raises:
        DataError: the template ignores the tools.
    """
    text = template.render(messages, tools)
    try:
        has_effect = text != template.render(messages)
    except DataError:
        has_effect = True  # the template requires the tools
    if has_effect:
        return
    names = ", ".join(str(tool.get("function", tool).get("name")) for tool in tools)
    raise DataError(
        f"has tools ({names}) that the chat template of the base does not render; remove the "
        "column tools, or set another data.chat_template"
    )


def check_results(messages: Sequence[Message], render: Render) -> None:
    """Raise DataError if the template ignores the result of a tool, or writes its tag twice.

    Args:
        messages: of the conversation.
        render: renders some or other messages of it.

    Raises:
        DataError: the template ignores a result, or a result already has the tag around it.
    """
    if all(message.role != "tool" for message in messages):
        return
    text = render(messages, False)
    for index, message in enumerate(messages):
        if message.role != "tool":
            continue
        _check_tag(message.content.strip(), text)
        if message.content.strip() in text:
            continue
        changed = [*messages]
        changed[index] = replace(message, content=PROBE)
        if render(changed, False) == text:
            raise DataError(
                f"has the tool result {truncated(message.content)}, which the chat template of "
                "the base does not render; remove the row, or set another data.chat_template"
            )


def _check_tag(result: str, text: str) -> None:
    """Refuse a result that starts with the tag that the template writes before it."""
    tag = re.match(TAG, result)
    if tag is None:
        return
    before, found, _ = text.partition(result)
    if found and before.rstrip().endswith(tag[0]):
        raise DataError(
            f"has the tool result {truncated(result)}, which starts with {tag[0]}, and the chat "
            "template of the base writes this tag too, so that it would be there twice; remove it "
            "from the result"
        )


def with_readable_arguments(messages: Sequence[Message], render: Render) -> Sequence[Message]:
    """Return the messages with the arguments of calls as the template can render them.

    Most templates expect an object; some append JSON text.

    Args:
        messages: with arguments as objects.
        render: renders messages with either form of arguments.

    Raises:
        DataError: the template takes neither, or writes an object in Python's syntax.
    """
    if not any(message.fields.get("tool_calls") for message in messages):
        return messages
    reason: DataError | None = None
    for variant in (messages, [_with_json_arguments(message) for message in messages]):
        try:
            text = render(variant, False)
        except DataError as error:
            reason = reason or error
            continue
        if not any(form in text for message in messages for form in _wrong_forms(message)):
            return variant
    raise reason or DataError(
        "has a tool call whose arguments the chat template of the base does not render as JSON; "
        "set another data.chat_template"
    )


def _with_json_arguments(message: Message) -> Message:
    calls = message.fields.get("tool_calls")
    if not calls:
        return message
    return replace(message, fields={**message.fields, "tool_calls": [_as_json(c) for c in calls]})


def _as_json(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", {})
    arguments = function.get("arguments")
    if not isinstance(arguments, Mapping):
        return call
    text = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _wrong_forms(message: Message) -> list[str]:
    """Return how a template would write arguments in Python's syntax, or as JSON in JSON."""
    forms = []
    for call in message.fields.get("tool_calls") or ():
        arguments = call.get("function", {}).get("arguments")
        if not isinstance(arguments, Mapping) or not arguments:
            continue
        forms += [repr(arguments), json.dumps(json.dumps(arguments, ensure_ascii=False))]
    return [form for form in forms if "'" in form or form.startswith('"')]
