"""Rows and settings that must be refused, with words that the message must have."""

from typing import Any

from dataset_checks.expectations import Row, RowCase, messages, refused
from dataset_checks.message_cases import weighted
from dataset_checks.schema_cases import ANSWER, ASK, MORE, TALK, TELL, USER
from dataset_checks.tool_cases import SCHEMA, tool_talk

PAIR = {"prompt": ASK, "completion": TELL}


def case(name: str, row: Row, *words: str, base: str = "chatml", **settings: Any) -> RowCase:
    """Return a case of one row that must be refused."""
    return RowCase(name, (row,), refused(*words), base, settings)


def answer(content: Any, **others: Any) -> dict[str, Any]:
    """Return a row with a question and an unusual answer."""
    return {"messages": [*messages(USER), {"role": "assistant", "content": content, **others}]}


COLUMNS = (
    case("preference", {"prompt": ASK, "chosen": TELL, "rejected": MORE}, "preference"),
    case(
        "preference without a prompt",
        {"chosen": messages(USER, ANSWER), "rejected": messages(USER, ("assistant", MORE))},
        "preference",
    ),
    case("preference with a completion", {**PAIR, "chosen": TELL, "rejected": MORE}, "rejected"),
    case("KTO, undesired", {**PAIR, "label": False}, "label"),
    case("images", {**PAIR, "images": ["box.png"]}, "images"),
    case("tokenized", {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, "input_ids"),
    case("tokenized next to text", {"text": TELL, "input_ids": [1, 2]}, "input_ids"),
    case("unknown columns", {"left": ASK, "right": TELL}, "left", "right", "data.columns"),
    case("prompt alone", {"prompt": ASK}, "prompt", "data.columns"),
    case("text and a pair", {**PAIR, "text": TELL}, "text", "prompt", "data.columns"),
    case("messages and a pair", {**PAIR, "messages": messages(USER, ANSWER)}, "messages", "prompt"),
    case(
        "two completions",
        {"question": ASK, "answer": TELL, "response": MORE},
        "answer",
        "response",
        "data.columns",
    ),
    case("absent mapped column", PAIR, "frage", columns={"prompt": "frage"}),
    case("absent group column", PAIR, "author", "group_column", group_column="author"),
)
VALUES = (
    case("empty completion", {"prompt": ASK, "completion": ""}, "completion"),
    case("blank completion", {"prompt": ASK, "completion": " \n"}, "completion"),
    case("null completion", {"prompt": ASK, "completion": None}, "completion"),
    case("number as completion", {"prompt": ASK, "completion": 7}, "7", "text"),
    case("truth value as completion", {"prompt": ASK, "completion": True}, "True", "text"),
    case("list as completion", {"prompt": ASK, "completion": ["a", "b"]}, "completion"),
    case("object as text", {"text": {"body": TELL}}, "text"),
    case("lone surrogate", {"prompt": "a\ud800b", "completion": TELL}, "surrogate"),
    case("lone surrogate in an answer", answer("a\udfffb"), "surrogate"),
    case("null content", answer(None), "message 2"),
    case("empty content", answer(""), "message 2"),
    case("number as content", answer(3), "message 2"),
    case("image part", answer([{"type": "image_url", "image_url": {"url": "x"}}]), "image_url"),
    case(
        "null question",
        {"messages": [{"role": "user", "content": None}, *messages(ANSWER)]},
        "message 1",
    ),
    case("no messages", {"messages": []}, "messages"),
    case("messages of text", {"messages": ["a", "b"]}, "message 1"),
    case("message without a role", {"messages": [{"content": ASK}, *messages(ANSWER)]}, "role"),
    case("no answer", {"messages": messages(USER)}, "assistant"),
    case("greeting alone", {"messages": messages(("assistant", "Hello."))}, "learn"),
    case("unknown role", {"messages": messages(("foo", ASK), ANSWER)}, "foo", "data.roles"),
    case("weight 0.5", {"messages": weighted("weight", 0.5, 1)}, "0.5", "weight"),
    case("weight as text", {"messages": weighted("weight", "no", 1)}, "no", "weight"),
    case("every weight 0", {"messages": weighted("weight", 0, 0)}, "weight"),
    case("weight and train disagree", answer(TELL, weight=0, train=True), "weight", "train"),
    case(
        "learned question",
        {"messages": [{**messages(USER)[0], "weight": 1}, *messages(ANSWER)]},
        "weight",
    ),
    case("unknown key of a message", answer(TELL, mood="glad"), "mood"),
    case("audio of a message", answer(TELL, audio={"id": "x"}), "audio"),
    case("tools that are not JSON", {"messages": tool_talk({}), "tools": "look_up"}, "tools"),
    case(
        "call without a name",
        answer(None, tool_calls=[{"function": {"arguments": {"box": 3}}}]),
        "name",
    ),
    case("arguments that are not JSON", {"messages": tool_talk("{box")}, "arguments"),
)
BASES = (
    case(
        "messages without a template",
        {"messages": messages(USER, ANSWER)},
        "template",
        base="plain",
    ),
    case("system without a template", {**PAIR, "system": "Be brief."}, "template", base="plain"),
    case(
        "template drops the system", {**PAIR, "system": "Be brief."}, "system", base="drops system"
    ),
    case(
        "template refuses the system",
        {**PAIR, "system": "Be brief."},
        "System role not supported",
        base="gemma",
    ),
    case(
        "template drops the tools", {"messages": messages(USER, ANSWER), "tools": [SCHEMA]}, "tools"
    ),
    case("template drops the calls", {"messages": tool_talk({"box": 3})}, "tool"),
    case("template drops reasoning", answer(TELL, reasoning_content="I look."), "reasoning"),
    case(
        "template escapes", {"prompt": ASK, "completion": "a < b & c"}, "a < b & c", base="escapes"
    ),
    case(
        "roles that must alternate",
        {"messages": messages(USER, *TALK)},
        "alternate",
        base="mistral",
    ),
)
SETTINGS = (
    case("eos_token that is not one token", PAIR, "<|stop|>", "eos_token", eos_token="<|stop|>"),
    case(
        "unused template argument",
        PAIR,
        "enable_thinking",
        template_arguments={"enable_thinking": False},
    ),
    case(
        "chatml without its tokens",
        {"messages": messages(*TALK)},
        "chatml",
        chat_template="chatml",
        base="no special tokens",
    ),
    case("absent template file", PAIR, "absent.jinja", chat_template="absent.jinja"),
)
CASES = (*COLUMNS, *VALUES, *BASES, *SETTINGS)
