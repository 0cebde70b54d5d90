"""Custom questions are read as they are written; an invalid line is refused by file and number."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import DataError
from pipelines.evaluation.items import Choice, Item
from pipelines.evaluation.probes import read_probes

Values = dict[str, Any]
CHOICES: Values = {"prompt": "The capital of France is", "choices": ["Paris", "Rome"], "gold": 0}
ANSWER: Values = {"prompt": "2 + 2 =", "answer": "4"}


def write(folder: Path, *rows: Values | str, name: str = "mine.jsonl") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read(folder: Path, *rows: Values | str) -> list[Item]:
    return read_probes([str(write(folder, *rows))], [folder])


def test_questions_with_choices_become_items(tmp_path: Path) -> None:
    first, second = read(tmp_path, CHOICES, {**CHOICES, "gold": 1})
    assert (first.kind, first.benchmark, first.id, first.gold) == ("general", "mine", "mine/1", 0)
    assert first.context == "The capital of France is"
    assert first.choices == (Choice("", " Paris"), Choice("", " Rome"))
    assert (second.id, second.gold) == ("mine/2", 1)


def test_questions_with_an_answer_become_items(tmp_path: Path) -> None:
    first, _ = read(tmp_path, ANSWER, ANSWER)
    assert (first.kind, first.id) == ("answer", "mine/1")
    assert (first.context, first.choices) == ("2 + 2 =", (Choice("", " 4"),))


@pytest.mark.parametrize(
    ("prompt", "answer", "joined"),
    [
        ("2 =", "4", "2 = 4"),
        ("2 = ", "4", "2 = 4"),
        ("2 =", " 4", "2 = 4"),
        ("2 =\n\n", "4", "2 =\n\n4"),
        ("2 =\t", "  4", "2 =\t  4"),
    ],
    ids=["nothing", "after the prompt", "before the answer", "lines", "both"],
)
def test_prompt_and_answer_are_joined_by_the_whitespace_between_them(
    tmp_path: Path, prompt: str, answer: str, joined: str
) -> None:
    row = {"prompt": prompt, "answer": answer}
    item, _ = read(tmp_path, row, row)
    assert item.context + item.choices[0].scored == joined
    assert not item.context[-1].isspace()


def test_blank_lines_are_counted_and_skipped(tmp_path: Path) -> None:
    items = read(tmp_path, ANSWER, "", ANSWER)
    assert [item.id for item in items] == ["mine/1", "mine/3"]


def test_a_unicode_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "one\u2028two", "answer": "three"}, ensure_ascii=False)
    assert len(read(tmp_path, row, row)) == 2


def test_each_folder_is_searched_for_a_relative_name(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    write(folders[1], ANSWER, ANSWER)
    assert len(read_probes(["mine.jsonl"], folders)) == 2


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
            "has choices and no gold; give the index of the right one, counted from 0",
        ),
        (
            {**CHOICES, "gold": 2},
            "has gold 2 for 2 choices; give the index of the right one, from 0 to 1",
        ),
        ({**CHOICES, "gold": -1}, "has gold -1 for 2 choices"),
        ({**CHOICES, "gold": "Paris"}, "has gold 'Paris' for 2 choices"),
        ({**CHOICES, "gold": True}, "has gold True for 2 choices"),
        ({**CHOICES, "choices": ["Paris"]}, "as its choices; give a list of at least two texts"),
        ({**CHOICES, "choices": "Paris"}, "has 'Paris' as its choices"),
        ({**CHOICES, "choices": ["Paris", " "]}, "has ' ' among its choices, which must be texts"),
        ({**CHOICES, "choices": ["Paris", 1]}, "has 1 among its choices, which must be texts"),
        ({**CHOICES, "choices": ["Paris", "Paris"]}, "repeats a choice"),
        (
            {**ANSWER, "prompt": "  "},
            "has '  ' as its prompt, which must be text; fill it or remove the line",
        ),
        ({**ANSWER, "answer": ""}, "has '' as its answer, which must be text"),
        ({**ANSWER, "prompt": None}, "has None as its prompt, which must be text"),
        ("{", "is not valid JSON"),
        ("[1]", "is not a JSON object"),
    ],
)
def test_an_invalid_line_is_refused_by_file_and_number(
    tmp_path: Path, row: Values | str, message: str
) -> None:
    path = write(tmp_path, CHOICES, row, CHOICES)
    with pytest.raises(DataError) as refused:
        read_probes([str(path)], [tmp_path])
    assert str(refused.value).startswith(f"line 2 of {path} ")
    assert message in str(refused.value)


def test_a_missing_file_is_refused_with_the_searched_folders(tmp_path: Path) -> None:
    message = f"probe file 'no.jsonl' is not in {tmp_path}; give a path relative to the recipe"
    with pytest.raises(DataError, match=message):
        read_probes(["no.jsonl"], [tmp_path])


def test_a_folder_is_refused_as_a_probe_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not in"):
        read_probes([str(tmp_path)], [tmp_path])


@pytest.mark.parametrize("rows", [[], [ANSWER]], ids=["none", "one"])
def test_too_few_questions_are_refused(tmp_path: Path, rows: list[Values]) -> None:
    message = f"has {len(rows)} questions; give at least 2, for an interval over them"
    with pytest.raises(DataError, match=message):
        read(tmp_path, *rows)


def test_questions_of_both_kinds_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="put each kind into a separate file"):
        read(tmp_path, CHOICES, ANSWER)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    paths = [write(folder, ANSWER, ANSWER) for folder in (tmp_path, other)]
    with pytest.raises(DataError, match="two probe files are named 'mine'"):
        read_probes([str(path) for path in paths], [tmp_path])


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    line = '{"prompt": "Größe", "answer": "0"}\n'
    (tmp_path / "mine.jsonl").write_bytes(line.encode("latin-1") * 2)
    with pytest.raises(DataError, match="is not valid UTF-8"):
        read_probes(["mine.jsonl"], [tmp_path])
