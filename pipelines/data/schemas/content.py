"""Text in a row: exactly as written, or an error that has the value, the rule and the fix.

`what` names the value in messages, such as `its completion` or `the content of message 2 (user)`.
"""

import json
from reprlib import repr as truncated
from typing import Any

from pipelines.errors import DataError


def is_empty(value: Any) -> bool:
    """Return whether a value contains nothing: null, an empty text, or lists of such values."""
    if isinstance(value, dict):
        return all(is_empty(part) for part in value.values())
    if isinstance(value, list):
        return all(is_empty(part) for part in value)
    return value is None or value == ""


def read_text(value: Any, what: str) -> str:
    """Return a text that has at least one visible character.

    Args:
        value: a cell, or a value in a message.
        what: names the value in messages.

    Raises:
        DataError: the value is not text, or has only white space.
    """
    text = _read_characters(value, what)
    if not text or text.isspace():
        raise DataError(
            f"has {truncated(text)} as {what}, which must contain text; fill it or remove the row"
        )
    return text


def read_optional_text(value: Any, what: str) -> str:
    """Return a text, or an empty one if the value is null or has no visible character.

    Args:
        value: a cell, or a value in a message.
        what: names the value in messages.

    Raises:
        DataError: the value is neither null nor text.
    """
    if value is None:
        return ""
    text = _read_characters(value, what)
    return "" if text.isspace() else text


def read_content(value: Any, what: str) -> str | None:
    """Return the content of a message, which is a text or a list of text parts; null is None.

    Args:
        value: a text, a list of text parts, or null.
        what: names the value in messages.

    Raises:
        DataError: the value has another type, or a part that is not text.
    """
    if value is None:
        return None
    if not isinstance(value, list):
        return _read_characters(value, what)
    return "".join(_read_part(part, what) for part in value)


def read_json(value: Any, what: str) -> Any:
    """Return a JSON value, which may be written as JSON text.

    Without a text, null keys are left out: Arrow files and exports from them fill each object with
    the keys of all others.

    Args:
        value: JSON text, or a value that is already decoded.
        what: names the value in messages.

    Raises:
        DataError: the text is not valid JSON, or has half of a surrogate pair.
    """
    if not isinstance(value, str):
        return _without_nulls(value, what)
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"has {truncated(value)} as {what}, which is not valid JSON ({error}); fix it or "
            "remove the row"
        ) from error
    _check_characters(json.dumps(parsed, ensure_ascii=False), what)
    return parsed


def is_blank(value: Any) -> bool:
    """Return whether a value is empty, or a text without a visible character."""
    return is_empty(value) or (isinstance(value, str) and value.isspace())


def _without_nulls(value: Any, what: str) -> Any:
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if part is not None}
        return {key: _without_nulls(part, what) for key, part in kept.items()}
    if isinstance(value, list):
        return [_without_nulls(part, what) for part in value]
    if isinstance(value, str):
        _check_characters(value, what)
    return value


def _read_part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return _read_characters(part, f"a part of {what}")
    if not isinstance(part, dict):
        raise DataError(
            f"has {truncated(part)} as a part of {what}; a part is a text, or a type and a text; "
            "fix or remove the row"
        )
    others = [key for key in part if key not in ("type", "text") and not is_empty(part[key])]
    kind = part.get("type") or "text"
    if kind != "text" or others:
        name = others[0] if kind == "text" else kind
        raise DataError(
            f"has a part {name!r} in {what}; only parts of type 'text' can be learned; remove the "
            "part or the row"
        )
    return _read_characters(part.get("text"), f"a part of {what}")


def _read_characters(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"has {truncated(value)} as {what}, which must be a string; write it as text or remove "
            "the row"
        )
    _check_characters(value, what)
    return value


def _check_characters(text: str, what: str) -> None:
    """Refuse half of a surrogate pair, which no tokenizer can encode."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])
        raise DataError(
            f"has {character} in {what}, a lone surrogate, which is not a character; fix or remove "
            "the row"
        ) from error
