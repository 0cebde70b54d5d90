"""Questions of the user's own are read as they are written, and a line that is none is refused by file and number."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import DataError
from pipelines.evaluation.items import Choice
from pipelines.evaluation.probes import read_probes

Values = dict[str, Any]
CHOICES: Values = {"prompt": "The capital of France is", "choices": ["Paris", "Rome"], "gold": 0}
ANSWER: Values = {"prompt": "2 + 2 =", "answer": "4"}


def write(folder: Path, *rows: Values | str, name: str = "mine.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def test_questions_with_choices_come_as_items(tmp_path: Path) -> None:
    first, second = read_probes([str(write(tmp_path, CHOICES, {**CHOICES, "gold": 1}))], [tmp_path])
    assert (first.kind, first.benchmark, first.id, first.gold) == ("general", "mine", "mine/1", 0)
    assert (first.context, first.choices) == (
        "The capital of France is",
        (Choice("", " Paris"), Choice("", " Rome")),
    )
    assert (second.id, second.gold) == ("mine/2", 1)


def test_questions_with_an_answer_come_as_items(tmp_path: Path) -> None:
    first, _ = read_probes([str(write(tmp_path, ANSWER, ANSWER))], [tmp_path])
    assert (first.kind, first.id, first.context, first.choices) == (
        "answer",
        "mine/1",
        "2 + 2 =",
        (Choice("", " 4"),),
    )


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("2 =", "4"), ("2 = ", "4"), ("2 =", " 4"), ("2 =\n\n", "4"), ("2 =\t", "  4")],
    ids=["nothing", "after the prompt", "before the answer", "lines", "both"],
)
def test_prompt_and_answer_join_with_what_stands_between_them(
    tmp_path: Path, prompt: str, answer: str
) -> None:
    item, _ = read_probes(
        [str(write(tmp_path, *[{"prompt": prompt, "answer": answer}] * 2))], [tmp_path]
    )
    between = (
        prompt + answer if prompt[-1].isspace() or answer[0].isspace() else f"{prompt} {answer}"
    )
    assert item.context + item.choices[0].scored == between
    assert not item.context[-1].isspace()


def test_blank_lines_count_and_are_passed_over(tmp_path: Path) -> None:
    assert [
        item.id for item in read_probes([str(write(tmp_path, ANSWER, "", ANSWER))], [tmp_path])
    ] == ["mine/1", "mine/3"]


def test_a_separator_of_lines_inside_a_text_is_no_end_of_line(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "one\u2028two", "answer": "three"}, ensure_ascii=False)
    assert len(read_probes([str(write(tmp_path, row, row))], [tmp_path])) == 2


def test_a_relative_name_is_looked_for_in_each_folder(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    write(tmp_path / "second", ANSWER, ANSWER)
    assert len(read_probes(["mine.jsonl"], [tmp_path / "first", tmp_path / "second"])) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a", "b"], "gold": 0}, "has no prompt; it has choices, gold"),
        ({}, "has no prompt; it has nothing"),
        ({"prompt": "a"}, "has neither choices nor an answer; give choices and gold, or an answer"),
        (
            {**CHOICES, "answer": "Paris"},
            "has both choices and an answer; give choices and gold, or an answer",
        ),
        (
            {"prompt": "a", "choices": ["b", "c"]},
            "has choices and no gold; give the place of the right one, counted from 0",
        ),
        (
            {**CHOICES, "gold": 2},
            "has gold 2 for 2 choices; give the place of the right one, from 0 to 1",
        ),
        ({**CHOICES, "gold": -1}, "has gold -1 for 2 choices"),
        ({**CHOICES, "gold": "Paris"}, "has gold 'Paris' for 2 choices"),
        ({**CHOICES, "gold": True}, "has gold True for 2 choices"),
        ({**CHOICES, "choices": ["Paris"]}, "as its choices; give a list of at least two texts"),
        ({**CHOICES, "choices": "Paris"}, "has 'Paris' as its choices"),
        ({**CHOICES, "choices": ["Paris", " "]}, "has ' ' among its choices, where text belongs"),
        ({**CHOICES, "choices": ["Paris", 1]}, "has 1 among its choices, where text belongs"),
        ({**CHOICES, "choices": ["Paris", "Paris"]}, "repeats a choice"),
        (
            {**ANSWER, "prompt": "  "},
            "has '  ' as its prompt, where text belongs; fill it or remove the line",
        ),
        ({**ANSWER, "answer": ""}, "has '' as its answer, where text belongs"),
        ({**ANSWER, "prompt": None}, "has None as its prompt, where text belongs"),
        ("{", "is no JSON"),
        ("[1]", "is no JSON object"),
    ],
)
def test_a_line_that_is_no_question_is_refused_by_file_and_number(
    tmp_path: Path, row: Values | str, message: str
) -> None:
    path = write(tmp_path, CHOICES, row, CHOICES)
    with pytest.raises(DataError) as refused:
        read_probes([str(path)], [tmp_path])
    assert str(refused.value).startswith(f"line 2 of {path} ")
    assert message in str(refused.value)


def test_a_missing_file_is_refused_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=f"probe file 'no.jsonl' is not in {tmp_path}; give a path relative to the recipe",
    ):
        read_probes(["no.jsonl"], [tmp_path])


def test_a_folder_is_no_file_of_questions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not in"):
        read_probes([str(tmp_path)], [tmp_path])


@pytest.mark.parametrize("rows", [[], [ANSWER]], ids=["none", "one"])
def test_too_few_questions_are_refused(tmp_path: Path, rows: list[Values]) -> None:
    with pytest.raises(
        DataError, match=f"holds {len(rows)} questions; give at least 2, for an interval over them"
    ):
        read_probes([str(write(tmp_path, *rows))], [tmp_path])


def test_questions_of_both_kinds_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="keep each kind in a file of its own"):
        read_probes([str(write(tmp_path, CHOICES, ANSWER))], [tmp_path])


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [write(place, ANSWER, ANSWER) for place in (tmp_path, tmp_path / "other")]
    with pytest.raises(DataError, match="two probe files are named 'mine'"):
        read_probes([str(path) for path in paths], [tmp_path])


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(
        '{"prompt": "Größe", "answer": "0"}\n'.encode("latin-1") * 2
    )
    with pytest.raises(DataError, match="is no UTF-8"):
        read_probes(["mine.jsonl"], [tmp_path])
