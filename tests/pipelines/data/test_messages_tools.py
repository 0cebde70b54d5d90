"""Tools and their calls reach the chat template in one form, however a source writes them."""

import json
from typing import Any

import pytest

from pipelines.config.data_section import WeightedSource
from pipelines.data.conversation import Conversation
from pipelines.data.schemas.schema import detect_schema
from pipelines.errors import DataError

FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"box": 1, "at": ""}}}
ARGUMENTS = '{"box": 1, "at": ""}'
USER = {"role": "user", "content": "Which box?"}
RESULT = {"role": "tool", "content": "red"}
ANSWER = {"role": "assistant", "content": "Box 1."}


def read(messages: list[Any], **row: Any) -> Conversation:
    values = {"messages": messages, **row}
    source = WeightedSource(source="rows.jsonl")
    schema = detect_schema(list(values), [values], source, supervise="assistant", group_column=None)
    parsed = schema.parse(values)
    assert isinstance(parsed, Conversation)
    return parsed


TOOLS = {
    "list": [TOOL],
    "JSON text": json.dumps([TOOL]),
    "JSON text of each": [json.dumps(TOOL)],
    "functions": [FUNCTION],
    "functions of type function": [{"type": "function", **FUNCTION}],
    "null keys": [{**TOOL, "strict": None, "function": {**FUNCTION, "description": None}}],
}


@pytest.mark.parametrize("tools", TOOLS.values(), ids=TOOLS)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_are_read_in_every_form(tools: Any, column: str) -> None:
    conversation = read([USER, ANSWER], **{column: tools})
    assert conversation.tools == (TOOL,)
    assert json.dumps(conversation.tools) == json.dumps([TOOL]), "the order of keys is kept"


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools_are_none(tools: Any) -> None:
    assert read([USER, ANSWER], tools=tools).tools is None


CALLS: dict[str, dict[str, Any]] = {
    "object": {"tool_calls": [CALL]},
    "arguments as text": {
        "tool_calls": [
            {"type": "function", "function": {"name": "look", "arguments": ARGUMENTS}},
        ]
    },
    "without wrapper": {"tool_calls": [{"name": "look", "arguments": ARGUMENTS}]},
    "JSON text": {"tool_calls": json.dumps([CALL])},
    "function_call": {"function_call": {"name": "look", "arguments": ARGUMENTS}},
    "filled keys": {
        "tool_calls": [
            {
                "id": None,
                "type": "function",
                "function": {"name": "look", "arguments": {"box": 1, "shelf": None, "at": ""}},
            }
        ],
        "function_call": None,
    },
}


@pytest.mark.parametrize("keys", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}], ids=str)
def test_calls_are_read_in_every_form(keys: dict[str, Any], content: dict[str, Any]) -> None:
    messages = read([USER, {"role": "assistant", **content, **keys}, RESULT, ANSWER]).messages
    assert messages[1].fields == {"tool_calls": [CALL]}
    assert messages[1].content == ""
    assert [message.supervised for message in messages] == [False, True, False, True]


def test_sharegpt_calls_and_observations_are_read() -> None:
    call = json.dumps({"name": "look", "arguments": {"box": None}})
    messages = read(
        [
            {"from": "human", "value": "Which box?"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "red"},
            {"from": "gpt", "value": "Box 1."},
        ]
    ).messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "assistant"]
    function = messages[1].fields["tool_calls"][0]["function"]
    assert function == {"name": "look", "arguments": {"box": None}}, "written nulls are kept"


def test_ids_and_names_reach_the_template() -> None:
    call = {"id": "c1", **CALL}
    result = {**RESULT, "tool_call_id": "c1", "name": "look"}
    messages = read([USER, {**ANSWER, "tool_calls": [call]}, result, ANSWER]).messages
    assert messages[1].for_template() == {**ANSWER, "tool_calls": [call]}
    assert messages[2].for_template() == result


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"tool_calls": [{"name": "look", "arguments": "{box"}]}, "is not valid JSON"),
        ({"tool_calls": [{"name": "look", "arguments": "[1]"}]}, "must be a JSON object"),
        ({"tool_calls": [{"name": "look", "parameters": {"a": 1}}]}, "the key 'parameters'"),
        ({"tool_calls": [{"arguments": "{}", "id": "1"}]}, "must have a name"),
        ({"tool_calls": [{"type": "retrieval", "id": "1"}]}, "'retrieval' as the type"),
        ({"tool_calls": 5}, "5 as the tool_calls"),
        ({"tool_calls": [CALL], "function_call": {"name": "look"}}, "remove one of them"),
        ({"tool_calls": []}, "None as the content"),
        ({"tool_calls": [{"name": "look", "arguments": '{"a": "\\ud83d"}'}]}, "lone surrogate"),
    ],
    ids=str,
)
def test_unreadable_calls_are_refused(keys: dict[str, Any], part: str) -> None:
    with pytest.raises(DataError) as caught:
        read([USER, {"role": "assistant", "content": None, **keys}, RESULT, ANSWER])
    assert part in str(caught.value)


def test_calls_of_a_user_are_refused() -> None:
    with pytest.raises(DataError, match="only an answer can have it"):
        read([{**USER, "tool_calls": [CALL]}, ANSWER])
