"""Rows of every usual schema are read, by usual names or by the recipe's mapping."""

import json
import pickle
from collections.abc import Mapping
from typing import Any

import pytest

from pipelines.config.data_section import WeightedSource
from pipelines.data.conversation import Conversation, PlainText
from pipelines.data.schemas.schema import Schema, detect_schema
from pipelines.errors import DataError

Row = dict[str, Any]
QUESTION = {"role": "user", "content": "Which box?"}
ANSWER = {"role": "assistant", "content": "Box 1."}
TALK = [QUESTION, ANSWER]
SHAREGPT = [{"from": "human", "value": "Which box?"}, {"from": "gpt", "value": "Box 1."}]
EXPECTED = [("user", "Which box?", False), ("assistant", "Box 1.", True)]
SYSTEM = ("system", "Be brief.", False)


def schema_of(*rows: Row, group_column: str | None = None, **settings: Any) -> Schema:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    supervise = settings.pop("supervise", "assistant")
    source = WeightedSource(source="rows.jsonl", **settings)
    return detect_schema(columns, rows, source, supervise=supervise, group_column=group_column)


def conversation_of(row: Row, **settings: Any) -> Conversation:
    parsed = schema_of(row, **settings).parse(row)
    assert isinstance(parsed, Conversation)
    return parsed


def turns_of(row: Row, **settings: Any) -> list[tuple[str, str, bool]]:
    messages = conversation_of(row, **settings).messages
    return [(message.role, message.content, message.supervised) for message in messages]


def refusal_of(*rows: Row, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        schema_of(*rows, **settings)
    return str(caught.value)


ONE_EXCHANGE: dict[str, tuple[Row, str]] = {
    "prompt/completion": ({"prompt": "Which box?", "completion": "Box 1."}, "prompt/completion"),
    "other case": ({"Question": "Which box?", "Response": "Box 1."}, "Question/Response"),
    "question/answer": ({"question": "Which box?", "answer": "Box 1."}, "question/answer"),
    "query/response": ({"query": "Which box?", "response": "Box 1."}, "query/response"),
    "input/output": ({"input": "Which box?", "output": "Box 1."}, "input/output"),
    "problem": ({"problem": "Which box?", "solution": "Box 1."}, "problem/solution"),
    "alpaca": ({"instruction": "Which box?", "input": "", "output": "Box 1."}, "alpaca"),
    "alpaca, only input": (
        {"instruction": "", "input": "Which box?", "output": "Box 1."},
        "alpaca",
    ),
    "messages": ({"messages": TALK}, "messages"),
    "JSON text": ({"messages": json.dumps(TALK)}, "messages"),
    "one list per key": (
        {"messages": {"role": ["user", "assistant"], "content": ["Which box?", "Box 1."]}},
        "messages",
    ),
    "sharegpt": ({"conversations": SHAREGPT}, "sharegpt"),
    "sharegpt, renamed": ({"messages": SHAREGPT}, "sharegpt"),
    "conversation": ({"conversation": TALK}, "messages"),
    "two lists": (
        {"prompt": [QUESTION], "completion": [ANSWER]},
        "conversational prompt/completion",
    ),
    "list and text": (
        {"prompt": [QUESTION], "completion": "Box 1."},
        "conversational prompt/completion",
    ),
    "text and list": ({"prompt": "Which box?", "completion": [ANSWER]}, "prompt/completion"),
}


@pytest.mark.parametrize(("row", "name"), ONE_EXCHANGE.values(), ids=ONE_EXCHANGE)
def test_usual_schemas_are_read(row: Row, name: str) -> None:
    assert turns_of(row) == EXPECTED
    assert schema_of(row).name == name


@pytest.mark.parametrize("text", ["word", " a\n\n", "a\x00b", "Cafe\u0301", "\ufeffmark"])
def test_text_is_read_exactly(text: str) -> None:
    assert schema_of({"text": text}).parse({"text": text}) == PlainText(text)
    pair = {"prompt": text, "completion": text}
    assert turns_of(pair) == [("user", text, False), ("assistant", text, True)]


def test_only_two_texts_are_a_pair() -> None:
    pair = {"prompt": "a", "completion": "b"}
    assert conversation_of(pair).is_pair
    assert conversation_of({**pair, "system": ""}).is_pair
    for column, value in {
        "system": "Be brief.",
        "history": [["c", "d"]],
        "tools": [{"name": "look"}],
    }.items():
        assert not conversation_of({**pair, column: value}).is_pair, column
    assert not conversation_of({"prompt": [QUESTION], "completion": "b"}).is_pair


def test_alpaca_columns_become_one_conversation() -> None:
    row = {
        "instruction": "Translate.",
        "input": "box",
        "output": "Kiste",
        "system": "Be brief.",
        "history": [["Hello", "Hi"]],
    }
    assert turns_of(row) == [
        SYSTEM,
        ("user", "Hello", False),
        ("assistant", "Hi", True),
        ("user", "Translate.\nbox", False),
        ("assistant", "Kiste", True),
    ]
    learned = [is_learned for _, _, is_learned in turns_of(row, supervise="last")]
    assert learned == [False, False, False, False, True]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row", [{"question": "Which box?", "response": "Box 1."}, {"messages": TALK}], ids=str
)
def test_system_column_is_the_first_turn(column: str, row: Row) -> None:
    assert turns_of({**row, column: "Be brief."}) == [SYSTEM, *EXPECTED]
    assert turns_of({**row, column: None}) == EXPECTED


def test_different_system_turns_are_refused() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, *TALK], "system": "Be brief."}
    assert turns_of(row) == [SYSTEM, *EXPECTED]
    with pytest.raises(DataError, match=r"'Be long.' as its system and 'Be brief.' as its first"):
        conversation_of({**row, "system": "Be long."})


MAPPED: dict[str, tuple[Row, Mapping[str, str]]] = {
    "both": ({"q": "Which box?", "a": "Box 1."}, {"prompt": "q", "completion": "a"}),
    "one": ({"q": "Which box?", "answer": "Box 1."}, {"prompt": "q"}),
    "among several": (
        {"problem": "Which box?", "solution": "Long.", "answer": "Box 1."},
        {"completion": "answer"},
    ),
    "desired answers": (
        {"prompt": "Which box?", "chosen": "Box 1.", "rejected": "No."},
        {"prompt": "prompt", "completion": "chosen"},
    ),
    "desired messages": ({"chosen": TALK, "rejected": TALK}, {"messages": "chosen"}),
    "messages, not pair": (
        {"messages": TALK, "prompt": "x", "completion": "y"},
        {"messages": "messages"},
    ),
}


@pytest.mark.parametrize(("row", "columns"), MAPPED.values(), ids=MAPPED)
def test_mapping_precedes_usual_names(row: Row, columns: Mapping[str, str]) -> None:
    assert turns_of(row, columns=columns) == EXPECTED


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"prompt": "q"}, ["'prompt', 'completion'", "names 'q' as the prompt"]),
        ({"text": "prompt", "completion": "completion"}, ["cannot be read together"]),
        ({"prompt": "prompt", "completion": "prompt"}, ["names a column twice"]),
        ({"messages": "prompt", "input": "completion"}, ["cannot be read together"]),
    ],
)
def test_impossible_mappings_are_refused(columns: Mapping[str, str], parts: list[str]) -> None:
    message = refusal_of({"prompt": "a", "completion": "b"}, columns=columns)
    assert all(part in message for part in ["'rows.jsonl'", *parts]), message


@pytest.mark.parametrize(
    ("row", "ways"),
    [
        (
            {"instruction": "i", "input": "x", "output": "o", "text": "t"},
            ["{text: text}", "{prompt: instruction, completion: output, input: input}"],
        ),
        (
            {"messages": TALK, "prompt": "p", "completion": "c"},
            ["{messages: messages}", "{prompt: prompt, completion: completion}"],
        ),
        (
            {"problem": "p", "solution": "s", "answer": "a"},
            ["{prompt: problem, completion: answer}", "{prompt: problem, completion: solution}"],
        ),
    ],
)
def test_ambiguous_columns_are_refused_with_each_way(row: Row, ways: list[str]) -> None:
    message = refusal_of(row)
    for way in ways:
        assert way in message
    assert "2 ways" in message


def test_unknown_columns_are_listed() -> None:
    message = refusal_of({"front": "a", "back": "b"})
    assert "'front', 'back'" in message
    assert "data.columns" in message


def test_used_and_unused_columns_are_reported() -> None:
    row = {"id": 1, "question": "a", "answer": "b", "group": "A", "score": 3}
    schema = schema_of(row)
    assert schema.used == ("question", "answer")
    assert schema.unused == ("id", "group", "score")
    grouped = schema_of(row, group_column="group")
    assert grouped.used == ("question", "answer", "group")
    assert "names 'topic'" in refusal_of(row, group_column="topic")


def test_schema_can_be_sent_to_another_process() -> None:
    row = {"prompt": "Which box?", "completion": "Box 1.", "label": True, "images": []}
    schema = schema_of(row)
    assert pickle.loads(pickle.dumps(schema)).parse(row) == schema.parse(row)  # noqa: S301
