"""Columns with a known meaning and values of the wrong type are refused, never ignored."""

from typing import Any

import pytest
import yaml

from pipelines.config.data_section import WeightedSource
from pipelines.data.schemas.schema import detect_schema
from pipelines.errors import DataError

Row = dict[str, Any]
PAIR = {"prompt": "Which box?", "completion": "Box 1."}
TALK = {
    "messages": [
        {"role": "user", "content": "Which box?"},
        {"role": "assistant", "content": "Box 1."},
    ]
}
COMPLETE = {"prompt": "prompt", "completion": "completion"}


def errors_of(*rows: Row, sample: int = 100, **settings: Any) -> list[str]:
    """Return the error of each row; empty for a row that is read."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    source = WeightedSource(source="rows.jsonl", **settings)
    schema = detect_schema(columns, rows[:sample], source, supervise="assistant", group_column=None)
    errors = []
    for row in rows:
        try:
            schema.parse(row)
            errors.append("")
        except DataError as error:
            errors.append(str(error))
    return errors


UNREADABLE = {
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data"),
    "implicit preference": ({"chosen": TALK["messages"], "rejected": []}, "preference data"),
    "preference and pair": ({**PAIR, "rejected": "c"}, "preference data"),
    "tokens": ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "'input_ids', 'attention_mask'"),
    "tokens and text": ({"text": "a", "labels": [1, 2]}, "'labels'"),
    "reasoning": ({**PAIR, "reasoning": "Hm."}, "'reasoning'"),
    "context": ({"question": "a", "context": "b", "answer": "c"}, "'context'"),
    "system of a text": ({"text": "a", "system": "b"}, "'system'"),
    "choices": ({"question": "a", "choices": ["b", "c"], "answer": "b"}, "'choices'"),
    "class of a text": ({"text": "a", "label": 0}, "'label'.*{prompt: text, completion: label}"),
    "summary of a text": ({"text": "a", "summary": "b"}, "'summary'"),
    "question of a text": ({"question": "a", "text": "b"}, "'question'"),
    "one message of a text": ({"text": "a", "role": "prompter"}, "each row is one message"),
    "one message": ({"role": "user", "content": "a"}, "each row is one message"),
    "history of messages": ({**TALK, "history": [["a", "b"]]}, "'history'"),
    "messages as text": (
        {"prompt": '[{"role": "user", "content": "a"}]', "completion": "b"},
        "written as text",
    ),
}


@pytest.mark.parametrize(("row", "part"), UNREADABLE.values(), ids=UNREADABLE)
def test_columns_are_refused_by_name(row: Row, part: str) -> None:
    with pytest.raises(DataError, match=part):
        errors_of(row)


@pytest.mark.parametrize(
    ("chosen", "others", "mapping"),
    [
        (TALK["messages"], {"prompt": "a"}, "{messages: chosen}"),
        (TALK["messages"][1:], {"prompt": "a"}, "{prompt: prompt, completion: chosen}"),
        ("b", {"question": "a"}, "{prompt: question, completion: chosen}"),
        ("Human: a Assistant: b", {}, "{text: chosen}"),
    ],
    ids=["messages", "answer", "texts", "text"],
)
def test_the_suggested_mapping_reads_the_desired_answers(
    chosen: Any, others: Row, mapping: str
) -> None:
    row = {**others, "chosen": chosen, "rejected": chosen}
    with pytest.raises(DataError) as refused:
        errors_of(row)
    assert f"data.columns: {mapping}" in str(refused.value)
    assert errors_of(row, columns=yaml.safe_load(mapping)) == [""]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "a", "label": 0, "role": "user"}, {"text": "text"}),
        ({"text": "a", "label": "b"}, {"prompt": "text", "completion": "label"}),
        ({"text": "a", "label": None}, {}),
    ],
    ids=["left out", "answer", "empty"],
)
def test_a_text_with_a_class_is_read_as_the_recipe_names_it(row: Row, columns: Row) -> None:
    assert errors_of(row, columns=columns) == [""]


@pytest.mark.parametrize("row", [{"text": "a"}, PAIR], ids=["text", "pair"])
def test_roles_without_effect_are_refused(row: Row) -> None:
    with pytest.raises(DataError, match=r"data\.roles .* no effect.*remove"):
        errors_of(row, roles={"bot": "assistant"})


def test_roles_of_a_history_have_an_effect() -> None:
    row = {**PAIR, "history": [{"role": "Customer", "content": "a"}]}
    assert errors_of(row, roles={"Customer": "user"}) == [""]


def test_a_complete_mapping_leaves_columns_out() -> None:
    row = {**PAIR, "rejected": "c", "reasoning": "Hm.", "context": "d", "input_ids": [1]}
    assert errors_of(row, columns=COMPLETE) == [""]


@pytest.mark.parametrize("undesired", [False, 0, "False", "0"])
@pytest.mark.parametrize("row", [PAIR, TALK], ids=["pair", "messages"])
def test_undesired_answers_are_refused(undesired: Any, row: Row) -> None:
    good, bad = errors_of({**row, "label": True}, {**row, "label": undesired})
    assert good == ""
    assert "'label'" in bad
    assert "preference data" in bad
    assert "bad_rows: drop" in bad


@pytest.mark.parametrize("labels", [("dog", "cat"), (0, 2), (None, None)], ids=str)
def test_other_labels_are_not_used(labels: tuple[Any, Any]) -> None:
    assert errors_of(*({**PAIR, "label": label} for label in labels)) == ["", ""]


@pytest.mark.parametrize(
    ("column", "harmless", "refused"),
    [
        ("images", [], ["box.png"]),
        ("image", {"bytes": None, "path": None}, {"bytes": None, "path": "box.png"}),
        ("audio", None, "box.wav"),
        ("weight", 1, 0.5),
        ("weight", "1.0", 0),
        ("train", True, False),
        ("loss_mask", None, [1, 0]),
        ("mask", None, [1, 0]),
        ("rejected", None, "No."),
    ],
)
def test_values_are_checked_in_every_row(column: str, harmless: Any, refused: Any) -> None:
    rows = [{**PAIR, column: harmless}] * 3
    *good, bad = errors_of(*rows, {**PAIR, column: refused}, sample=3)
    assert good == ["", "", ""]
    assert f"in the column {column!r}" in bad


@pytest.mark.parametrize("value", [5, 2.5, True, None, [], ["a"], {}, "", "  \n", "odd \ud83d"])
@pytest.mark.parametrize("column", ["text", "prompt", "completion"])
def test_values_that_are_not_text_are_refused(column: str, value: Any) -> None:
    row = {**PAIR, column: value}
    if column == "text":
        row = {column: value}
    (error,) = errors_of(row)
    assert f"its {column}" in error
    assert "row" in error


def test_missing_values_are_refused() -> None:
    good, bad = errors_of(PAIR, {"prompt": "Which box?"})
    assert good == ""
    assert bad.startswith("has None as its completion")


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "a", "completion": TALK["messages"]}, "starts with a message of role 'user'"),
        ({"prompt": TALK["messages"], "completion": "b", "history": [["a", "b"]]}, "its history"),
        ({"prompt": "a", "completion": "b", "history": [["a"]]}, "pair 1 of its history"),
        ({"prompt": "a", "completion": "b", "history": "none"}, "its history"),
        ({"prompt": "a", "completion": "b", "system": 5}, "5 as its system"),
        ({"prompt": "a", "completion": "b", "tools": "hammer"}, "'hammer' as its tools"),
        ({"instruction": "a", "input": 7, "output": "b"}, "7 as its input"),
    ],
    ids=str,
)
def test_parts_of_a_pair_that_do_not_fit_are_refused(row: Row, part: str) -> None:
    (error,) = errors_of(row)
    assert part in error
