"""Conversations with tools: their schemas, the calls of them, and what they return."""

from typing import Any

from dataset_checks.expectations import Learned, RowCase, chatml, messages
from dataset_checks.schema_cases import ANSWER, ASK, ONE, TELL, USER, sharegpt

SCHEMA = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
TOOL_WITH_PARAMETERS = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a box.",
        "parameters": {
            "type": "object",
            "properties": {"box": {"type": "integer", "description": "Its number."}},
            "required": ["box"],
        },
    },
}
SHOWN_SCHEMA = (
    '<|im_start|>system\nTools: [{"type": "function", "function": {"name": "look_up", '
    '"parameters": {"type": "object"}}}]<|im_end|>\n'
)
CALL = '<tool_call>look_up {"box": 3}</tool_call>'
RESULT = ("tool", "gray")


def call(arguments: Any) -> dict[str, Any]:
    """Return an assistant's turn that calls a tool."""
    function = {"name": "look_up", "arguments": arguments}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def tool_talk(arguments: Any) -> list[dict[str, Any]]:
    """Return a question, a call, its result and the answer."""
    result = {"role": "tool", "tool_call_id": "call_1", "content": "gray"}
    return [*messages(USER), call(arguments), result, *messages(ANSWER)]


CALLED = (
    Learned(
        SHOWN_SCHEMA + chatml(USER, ("assistant", CALL), RESULT, ANSWER),
        (f"{CALL}<|im_end|>", f"{TELL}<|im_end|>"),
        TELL,
    ),
)
UNLISTED = "TRL is not given the calls in this form"
CASES = (
    RowCase(
        "tool calls", ({"messages": tool_talk({"box": 3}), "tools": [SCHEMA]},), CALLED, "tools"
    ),
    RowCase(
        "tool calls as JSON text",
        ({"messages": tool_talk('{"box": 3}'), "tools": [SCHEMA]},),
        CALLED,
        "tools",
        differs_from_trl="renders the arguments as a JSON string",
    ),
    RowCase(
        "tools as JSON text",
        (
            {
                "messages": tool_talk({"box": 3}),
                "tools": '[{"type": "function", "function": {"name": "look_up", '
                '"parameters": {"type": "object"}}}]',
            },
        ),
        CALLED,
        "tools",
    ),
    RowCase(
        "tools that are not called",
        ({"messages": messages(USER, ANSWER), "tools": [SCHEMA]},),
        (Learned(SHOWN_SCHEMA + chatml(USER, ANSWER), (f"{TELL}<|im_end|>",), TELL),),
        "tools",
    ),
    RowCase(
        "empty tools",
        ({"messages": messages(USER, ANSWER), "tools": []},),
        ONE,
        "tools",
    ),
    RowCase(
        "content and a call",
        (
            {
                "messages": [
                    *messages(USER),
                    {**call({"box": 3}), "content": "I look."},
                    *messages(RESULT, ANSWER),
                ]
            },
        ),
        (
            Learned(
                chatml(USER, ("assistant", "I look." + CALL), RESULT, ANSWER),
                (f"I look.{CALL}<|im_end|>", f"{TELL}<|im_end|>"),
                TELL,
            ),
        ),
        "tools",
    ),
    RowCase(
        "function_call",
        (
            {
                "messages": [
                    *messages(USER),
                    {
                        "role": "assistant",
                        "content": None,
                        "function_call": {"name": "look_up", "arguments": '{"box": 3}'},
                    },
                    {"role": "function", "name": "look_up", "content": "gray"},
                    *messages(ANSWER),
                ],
                "tools": [SCHEMA],
            },
        ),
        CALLED,
        "tools",
        differs_from_trl=UNLISTED,
    ),
    RowCase(
        "ShareGPT calls",
        (
            {
                "conversations": sharegpt(
                    ("human", ASK),
                    ("function_call", '{"name": "look_up", "arguments": {"box": 3}}'),
                    ("observation", "gray"),
                    ("gpt", TELL),
                ),
                "tools": '[{"type": "function", "function": {"name": "look_up", '
                '"parameters": {"type": "object"}}}]',
            },
        ),
        CALLED,
        "tools",
        differs_from_trl=UNLISTED,
    ),
)
