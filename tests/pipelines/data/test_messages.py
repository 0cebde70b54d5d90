"""Messages: roles, contents, what is supervised, and tools."""

from typing import Any

import pytest

from pipelines.config.data_section import WeightedSource
from pipelines.data.conversation import Conversation
from pipelines.data.schemas.schema import detect_schema
from pipelines.errors import DataError

Item = dict[str, Any]


def user(content: Any = "Which box?", **others: Any) -> Item:
    return {"role": "user", "content": content, **others}


def answer(content: Any = "Box 1.", **others: Any) -> Item:
    return {"role": "assistant", "content": content, **others}


def read(*items: Any, supervise: Any = "assistant", roles: Any = None, **row: Any) -> Conversation:
    values = {"messages": list(items), **row}
    source = WeightedSource(source="rows.jsonl", roles=roles or {})
    schema = detect_schema(list(values), [values], source, supervise=supervise, group_column=None)
    parsed = schema.parse(values)
    assert isinstance(parsed, Conversation)
    return parsed


def learned(*items: Any, **options: Any) -> list[bool]:
    return [message.supervised for message in read(*items, **options).messages]


def refusal_of(*items: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*items, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("User", "Assistant"), {}),
        (("human", "gpt"), {}),
        (("user", "model"), {}),
        (("prompter", "bot"), {}),
        (("q", "a"), {"q": "user", "a": "assistant"}),
        (("bot", "user"), {"bot": "user", "user": "assistant"}),
        ((0, 1), {"0": "user", "1": "assistant"}),
    ],
)
def test_role_names_are_mapped(names: tuple[Any, Any], roles: Any) -> None:
    items = [{"role": name, "content": str(name)} for name in names]
    assert [message.role for message in read(*items, roles=roles).messages] == ["user", "assistant"]


def test_unknown_role_is_refused_with_the_roles_found() -> None:
    message = refusal_of(user(), {"role": "robot", "content": "Box 1."})
    assert "'user', 'robot'" in message
    assert "data.roles" in message


def test_developer_and_observation_are_usual_roles() -> None:
    items = [{"role": "developer", "content": "Be brief."}, user(), answer()]
    assert read(*items).messages[0].role == "system"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Which "}, {"type": "text", "text": "box?", "image": None}]
    assert read(user(parts), answer(["Box ", "1."])).messages[0].content == "Which box?"


REFUSED = {
    "null": ([user(), answer(None)], "None as the content of message 2 (assistant)"),
    "empty": ([user(""), answer()], "'' as the content of message 1 (user)"),
    "whitespace": ([user(), answer(" \n")], "message 2 (assistant)"),
    "number": ([user(5), answer()], "5 as the content of message 1 (user)"),
    "object": ([user(), answer({"a": 1})], "{'a': 1} as the content of message 2"),
    "surrogate": ([user(), answer("odd \udc00")], r"'\udc00' in the content of message 2"),
    "image": ([user([{"type": "image_url", "image_url": "a"}]), answer()], "'image_url'"),
    "audio": ([user([{"type": "input_audio"}]), answer()], "'input_audio'"),
    "text": (["Hello", answer()], "'Hello' as message 1"),
    "no role": ([{"content": "a"}, answer()], "message 1"),
    "two roles": ([user(**{"from": "human"}), answer()], "'human' as the from"),
    "unknown key": ([user(), answer(mood="glad")], "'glad' as the mood of message 2"),
    "reasoning of a user": ([user(thinking="Hm."), answer()], "only an answer can have it"),
    "half weight": ([user(), answer(weight=0.5)], "0.5 as the weight of message 2"),
    "weight as text": ([user(), answer(weight="0")], "'0' as the weight of message 2"),
    "weight of a user": ([user(weight=1), answer()], "1 as the weight of message 1 (user)"),
    "contradiction": ([user(), answer(weight=0, train=True)], "contradict"),
    "no answer": ([user()], "has no message of role 'assistant'"),
    "only a greeting": ([answer(), user()], "nothing to learn from"),
    "only weight 0": ([user(), answer(weight=0)], "nothing to learn from"),
    "no message": ([], "must contain a message"),
}


@pytest.mark.parametrize(("items", "part"), REFUSED.values(), ids=REFUSED)
def test_unreadable_messages_are_refused(items: list[Any], part: str) -> None:
    assert part in refusal_of(*items)


def test_all_unusual_keys_of_a_message_are_reported_at_once() -> None:
    message = refusal_of(user(mood="odd", prefix=True), answer())
    assert "'odd' as the mood, True as the prefix of message 1 (user)" in message


def test_the_suggested_role_is_a_text_as_the_recipe_needs() -> None:
    message = refusal_of({"role": 0, "content": "Which box?"}, answer())
    assert "{'0': user}" in message


def test_empty_values_and_metadata_have_no_effect() -> None:
    extras = {"refusal": None, "annotations": [], "function_call": None, "weight": None, "id": "7"}
    assert read(user(timestamp=3), answer(**extras)) == read(user(), answer())


def test_an_empty_system_message_counts_as_absent() -> None:
    for content in ("", " \n"):
        item = {"role": "system", "content": content}
        assert read(item, user(), answer()) == read(user(), answer())


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("off", [0, 0.0, False])
def test_answers_with_weight_zero_are_not_learned(key: str, off: Any) -> None:
    items = [user(), answer(**{key: off}), user(), answer(**{key: 1}), user(), answer()]
    assert learned(*items) == [False, False, False, True, False, True]
    assert learned(*items, supervise="all") == [True, False, True, True, True, True]


def test_every_answer_or_the_last_or_every_turn_is_learned() -> None:
    items = [user(), answer(), user(), answer()]
    assert learned(*items) == [False, True, False, True]
    assert learned(*items, supervise="last") == [False, False, False, True]
    assert learned(*items, supervise="all") == [True, True, True, True]
    assert learned(user(weight=0), answer(), supervise="all") == [False, True]


def test_a_greeting_is_part_of_the_prompt() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert learned(answer("Hello."), user(), answer()) == [False, False, True]
    assert learned(system, answer("Hello."), user(), answer()) == [False, False, False, True]
    assert learned(answer("Hello.", weight=1), user(), answer()) == [True, False, True]


def test_turns_after_the_last_learned_one_are_left_out() -> None:
    assert read(user(), answer(), user(), answer(weight=0), user()) == read(user(), answer())


def test_reasoning_is_passed_to_the_template() -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        message = read(user(), answer(**{key: "Hm."})).messages[1]
        assert message.for_template() == {"role": "assistant", "content": "Box 1.", key: "Hm."}
