"""Tools and their calls, in the form that chat templates expect.

A tool is `{"type": "function", "function": {"name": …, "parameters": …}}`; a call is
`{"type": "function", "function": {"name": …, "arguments": {…}}}`, with its id if it has one.
"""

from reprlib import repr as truncated
from typing import Any

from pipelines.data.schemas.content import is_blank, read_json
from pipelines.errors import DataError

Function = dict[str, Any]
_WRAPPER_KEYS = ("type", "id", "index")


def read_tools(value: Any) -> tuple[Function, ...] | None:
    """Return the JSON schemas of the tools of a row, or None if it has none.

    Args:
        value: a list of schemas, with or without the wrapper `function`, or JSON text of one.

    Raises:
        DataError: the value is not a list of schemas with names.
    """
    if is_blank(value):
        return None
    tools = read_json(value, "its tools")
    if not isinstance(tools, list):
        raise DataError(
            f"has {truncated(value)} as its tools, which must be a list of JSON schemas; fix it or "
            "remove the row"
        )
    return tuple(_wrap(tool, f"tool {number}") for number, tool in enumerate(tools, 1)) or None


def read_tool_calls(value: Any, what: str) -> list[Function]:
    """Return the calls of a message; empty if it has none.

    Args:
        value: a list of calls, one call, or JSON text of either.
        what: the name of the value in messages.
    """
    if is_blank(value):
        return []
    calls = read_json(value, what)
    if not isinstance(calls, list):
        calls = [calls]
    return [_read_call(call, what) for call in calls]


def _read_call(call: Any, what: str) -> Function:
    wrapped = _wrap(call, what)
    function = wrapped["function"]
    for key in function:
        if key not in ("name", "arguments"):
            raise DataError(
                f"has the key {key!r} in {what}; a call has a name and arguments; rename or remove "
                "the key"
            )
    arguments = _read_arguments(function.get("arguments"), f"the arguments of {what}")
    return {**wrapped, "function": {**function, "arguments": arguments}}


def _wrap(value: Any, what: str) -> Function:
    """Return a function in its wrapper."""
    parsed = value
    if isinstance(value, str):
        parsed = read_json(value, what)
    if not isinstance(parsed, dict):
        raise DataError(
            f"has {truncated(value)} as {what}, which must be a function with a name; fix it or "
            "remove the row"
        )
    kind = parsed.get("type", "function")
    if kind != "function":
        raise DataError(
            f"has {truncated(kind)} as the type of {what}, which must be 'function'; change it or "
            "remove the row"
        )
    wrapped = _in_wrapper(parsed)
    _check_name(wrapped["function"], what)
    return wrapped


def _in_wrapper(value: Function) -> Function:
    """Return a function in its wrapper; the order of keys is kept, because templates write them."""
    if "function" in value:
        return {"type": "function", **value} if "type" not in value else value
    wrapper = {key: value[key] for key in _WRAPPER_KEYS if key in value}
    function = {key: part for key, part in value.items() if key not in _WRAPPER_KEYS}
    return {"type": "function", **wrapper, "function": function}


def _check_name(function: Any, what: str) -> None:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise DataError(
            f"has {truncated(function)} as {what}, which must have a name; add it or remove the row"
        )


def _read_arguments(value: Any, what: str) -> Function:
    """Return the arguments of a call as an object; templates write them as JSON."""
    if value is None or value == "":
        return {}
    arguments = value
    if isinstance(value, str):
        arguments = read_json(value, what)
    if not isinstance(arguments, dict):
        raise DataError(
            f"has {truncated(value)} as {what}, which must be a JSON object; fix them or remove "
            "the row"
        )
    return dict(arguments)
