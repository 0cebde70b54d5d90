"""Messages of a row under any usual key: role and content, or from and value.

A system message without text counts as absent, because exports write one for every row. Keys that
a message may have in addition to its role and content:

| key | effect |
|---|---|
| `weight`, `train`, `training`, `loss` | 0 or false: the answer is not learned |
| `tool_calls`, `function_call` | calls of tools, as `tool_calls` for the chat template |
| `tool_call_id`, `name`, `reasoning_content`, `reasoning`, `thinking` | for the chat template |
| `METADATA` | none |

Any other key is refused unless it is null or empty, because its value would be dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as truncated
from typing import Any, Literal

from pipelines.config.data_section import RoleName
from pipelines.data.schemas.content import is_empty, read_content, read_json, read_text
from pipelines.data.schemas.roles import USUAL_ROLES, find_role
from pipelines.data.schemas.tool_calls import read_tool_calls
from pipelines.errors import DataError

ROLE_KEYS = ("role", "from")
FLAGS = ("weight", "train", "training", "loss")
TOOL_CALLS = "tool_calls"
"""Key of calls for the chat template."""
CALLS = (TOOL_CALLS, "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
TEMPLATE_TEXTS = ("tool_call_id", "name", *REASONING)
METADATA = (
    "id",
    "message_id",
    "parent_id",
    "index",
    "turn",
    "timestamp",
    "created_at",
    "model",
    "language",
    "turn_identifier",
    "hashed_ip",
    "country",
    "state",
    "header",
    "redacted",
    "toxic",
)
"""Keys that describe a message and are not part of the conversation; the last ones are those of
WildChat (Zhao et al. 2024)."""
KNOWN_KEYS = (*FLAGS, *CALLS, *TEMPLATE_TEXTS, *METADATA)
"""Keys of a message in addition to its role and content."""


@dataclass(frozen=True)
class MessageRules:
    """How the recipe reads messages."""

    roles: Mapping[str, RoleName]
    """Role in the source → its usual name."""
    supervise: Literal["assistant", "last", "all"]
    """Which turns are learned."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of a row, before it is decided whether it is supervised."""

    role: RoleName
    content: str
    fields: Mapping[str, Any]
    """What else the chat template receives."""
    learn: bool | None = None
    """Whether the row declares that the turn is learned; None if it declares nothing."""


def read_turns(value: Any, what: str, rules: MessageRules) -> list[Turn]:
    """Return the turns of a list of messages.

    Args:
        value: a list of messages, JSON text of one, or one list per key of a message.
        what: the name of the value in error messages, such as `its messages`.
        rules: how the recipe reads messages.

    Raises:
        DataError: a message cannot be read exactly as it is meant.
    """
    items = value
    if isinstance(value, str):
        items = read_json(value, what)
    if isinstance(items, dict):
        items = _transpose(items, what)
    if not isinstance(items, list):
        raise _not_messages(value, what)
    turns = [_read_turn(items, index, what, rules) for index in range(len(items))]
    turns = [turn for turn in turns if turn.role != "system" or turn.content]
    if not turns:
        raise DataError(
            f"has {truncated(value)} as {what}, which must contain a message; fill it or remove "
            "the row"
        )
    return turns


def is_message_list(value: Any) -> bool:
    """Return whether a value is a list of messages, or one list per key of a message."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and any(key in first for key in ROLE_KEYS)


def _transpose(columns: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """Turn one list per key into one object per message."""
    lists = {key: values for key, values in columns.items() if values is not None}
    if not all(isinstance(values, list) for values in lists.values()):
        raise _not_messages(columns, what)
    lengths = {len(values) for values in lists.values()}
    if len(lengths) != 1:
        raise _not_messages(columns, what)
    rows = zip(*lists.values(), strict=True)
    return [dict(zip(lists, values, strict=True)) for values in rows]


def _read_turn(items: list[Any], index: int, what: str, rules: MessageRules) -> Turn:
    item = items[index]
    where = f"message {index + 1}"
    if what != "its messages":
        where = f"{where} of {what}"
    role_key = _find_role_key(item, where)
    name = item[role_key]
    role = find_role(name, rules.roles)
    if role is None:
        raise _unknown_role(name, items)
    where = f"{where} ({name})"
    content_key = "value" if item.get("content") is None else "content"
    content = item.get(content_key)
    others = _other_values(item, role_key=role_key, content_key=content_key)
    if role == "call":
        _check_no_other_call(others, where)
        call = read_text(content, f"the content of {where}")
        others = {**others, TOOL_CALLS: call}
        role = "assistant"
        content = None
    learn = _read_flags(others, role, where, rules)
    fields = _read_fields(others, role, where)
    text = read_content(content, f"the content of {where}")
    return Turn(role, _check_content(text, role, fields, where), fields, learn)


def _not_messages(value: Any, what: str) -> DataError:
    return DataError(
        f"has {truncated(value)} as {what}, which must be a list of messages with role and "
        "content; fix or remove the row"
    )


def _find_role_key(item: Any, where: str) -> str:
    if isinstance(item, dict):
        for key in ROLE_KEYS:
            if item.get(key) is not None:
                return key
    raise DataError(
        f"has {truncated(item)} as {where}, which must have a role and a content (or from and "
        "value); fix or remove the row"
    )


def _other_values(item: Mapping[str, Any], *, role_key: str, content_key: str) -> dict[str, Any]:
    """Return the values under other keys that are not empty."""
    others = dict[str, Any]()
    for key, value in item.items():
        if key not in (role_key, content_key) and not is_empty(value):
            others[key] = value
    return others


def _unknown_role(name: Any, items: list[Any]) -> DataError:
    names = dict[str, None]()
    for item in items:
        if isinstance(item, dict):
            present = [item[key] for key in ROLE_KEYS if item.get(key) is not None]
            names.update(dict.fromkeys(map(repr, present)))
    found = ", ".join(names)
    usual = ", ".join(USUAL_ROLES)
    return DataError(
        f"has the roles {found}, and {truncated(name)} is not a usual name of {usual}; map it to "
        f"one of them in data.roles, such as {{{str(name)!r}: user}}"
    )


def _check_no_other_call(others: Mapping[str, Any], where: str) -> None:
    for key in CALLS:
        if key in others:
            raise DataError(
                f"has {key} in {where}, whose content is a call already; remove one of them"
            )


def _check_content(
    content: str | None, role: RoleName, fields: Mapping[str, Any], where: str
) -> str:
    """Return the content, which only some turns may lack."""
    if role == "assistant" and TOOL_CALLS in fields:
        return content or ""
    needs_text = role in ("user", "assistant")
    if content is None or (needs_text and not content.strip()):
        raise DataError(
            f"has {truncated(content)} as the content of {where}, which must contain text; fill it "
            "or remove the row"
        )
    if role == "system" and content.isspace():
        return ""
    return content


def _read_flags(
    others: Mapping[str, Any], role: RoleName, where: str, rules: MessageRules
) -> bool | None:
    """Return whether the row declares that a turn is learned."""
    flags = {key: _read_flag(others[key], key, where) for key in FLAGS if key in others}
    if not flags:
        return None
    if len(set(flags.values())) > 1:
        values = ", ".join(f"{key} {others[key]!r}" for key in flags)
        raise DataError(f"has {values} in {where}, which contradict each other; remove one of them")
    key, is_learned = next(iter(flags.items()))
    can_be_learned = role == "assistant" or rules.supervise == "all"
    if is_learned and not can_be_learned:
        raise DataError(
            f"has {others[key]!r} as the {key} of {where}; only answers are learned; remove it or "
            "set data.supervise: all"
        )
    return is_learned


def _read_flag(value: Any, key: str, where: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise DataError(
        f"has {truncated(value)} as the {key} of {where}; a {key} is 0 or 1; change it or remove "
        "the row"
    )


def _read_fields(others: Mapping[str, Any], role: RoleName, where: str) -> dict[str, Any]:
    """Return what the chat template receives in addition to role and content."""
    fields: dict[str, Any] = {}
    for key, value in others.items():
        what = f"the {key} of {where}"
        if key in CALLS or key in REASONING:
            _check_is_answer(value, key, role, where)
        if key in CALLS:
            _add_calls(fields, read_tool_calls(value, what), where)
        elif key in TEMPLATE_TEXTS:
            fields[key] = read_text(value, what)
    unknown = [key for key in others if key not in KNOWN_KEYS]
    if unknown:
        values = ", ".join(f"{truncated(others[key])} as the {key}" for key in unknown)
        raise DataError(
            f"has {values} of {where}, which is not a usual key of a message and would not be "
            "learned; remove it"
        )
    return fields


def _check_is_answer(value: Any, key: str, role: RoleName, where: str) -> None:
    if role != "assistant":
        raise DataError(
            f"has {truncated(value)} as the {key} of {where}; only an answer can have it; move it "
            "to an assistant's message or remove it"
        )


def _add_calls(fields: dict[str, Any], calls: list[dict[str, Any]], where: str) -> None:
    if TOOL_CALLS in fields:
        raise DataError(f"has {' and '.join(CALLS)} in {where}; remove one of them")
    if calls:
        fields[TOOL_CALLS] = calls
