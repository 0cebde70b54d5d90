"""Roles of a conversation under the names that sources give them."""

from collections.abc import Mapping
from typing import Any, Literal

from pipelines.config.data_section import RoleName

USUAL_ROLES: dict[RoleName, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "question"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "answer"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response"),
}
"""Role → its names in sources, in lower case; capital letters make no difference."""
CALL_ROLES = ("function_call", "tool_call")
"""Names of assistant turns whose content is a call of a tool, written as JSON."""

_ROLE_OF = {name: role for role, names in USUAL_ROLES.items() for name in names}


def find_role(name: Any, roles: Mapping[str, RoleName]) -> RoleName | Literal["call"] | None:
    """Return the role that a name means: `call` for a call of a tool, None if unknown.

    Args:
        name: as written in the source.
        roles: name in the source → role, as in `data.roles`; it precedes the usual names.
    """
    usual = str(name).lower()
    if str(name) in roles:
        return roles[str(name)]
    if usual in CALL_ROLES:
        return "call"
    return _ROLE_OF.get(usual)
