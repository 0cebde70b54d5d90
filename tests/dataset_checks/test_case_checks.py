"""The checks of a case report every kind of difference, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest

from dataset_checks.bases import base
from dataset_checks.expectations import FileCase, RowCase, learned_pairs, refused
from dataset_checks.file_cases import HELD_OUT, LINES
from dataset_checks.observed import run_row_case
from dataset_checks.prepared_files import run_file_case
from dataset_checks.schema_cases import ONE, TELL, TWO
from dataset_checks.written_files import PAIRS, text

RIGHT = RowCase("right", ({"question": "Which color has box 3?", "answer": TELL},), ONE)
RIGHT_PAIRS = learned_pairs(PAIRS)


@pytest.fixture(scope="module")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer whose template is ChatML."""
    folder = tmp_path_factory.mktemp("bases") / "chatml"
    base("chatml").save_pretrained(str(folder))
    return folder


def test_an_expected_outcome_is_not_a_problem() -> None:
    assert run_row_case(RIGHT).problem == ""


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        (replace(RIGHT, expected=(replace(ONE[0], text="other"),)), "the text"),
        (replace(RIGHT, expected=(replace(ONE[0], spans=(TELL,)),)), "supervised"),
        (replace(RIGHT, expected=(replace(ONE[0], reference="other"),)), "reference"),
        (replace(RIGHT, expected=(*ONE, *TWO)), "1 examples instead of 2"),
        (replace(RIGHT, notes=("empty thinking",)), "notes"),
        (replace(RIGHT, groups=2), "1 groups instead of 2"),
        (replace(RIGHT, expected=refused("answer")), "not refused"),
        (replace(RIGHT, rows=({"question": "Which?", "answer": None},)), "refused: row 1"),
        (
            replace(RIGHT, rows=({"left": "a"},), expected=refused("left", "absent word")),
            "refused without ['absent word']",
        ),
    ],
    ids=[
        "text",
        "supervised",
        "reference",
        "number of examples",
        "notes",
        "groups",
        "not refused",
        "refused",
        "refused with other words",
    ],
)
def test_a_different_outcome_is_reported(case: RowCase, problem: str) -> None:
    assert problem in run_row_case(case).problem


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        (FileCase("right", text("rows.jsonl", LINES), RIGHT_PAIRS), ""),
        (FileCase("too many", text("rows.jsonl", LINES + HELD_OUT), RIGHT_PAIRS), "0 missing"),
        (FileCase("too few", text("rows.jsonl", LINES), (*RIGHT_PAIRS, ("a", "b"))), "1 missing"),
        (FileCase("other rows held out", text("rows.jsonl", LINES), RIGHT_PAIRS, ()), "validation"),
        (FileCase("not refused", text("rows.jsonl", LINES), refused("rows")), "not refused"),
    ],
    ids=lambda value: value.name if isinstance(value, FileCase) else "",
)
def test_a_different_split_is_reported(case: FileCase, problem: str, chatml_folder: Path) -> None:
    found = run_file_case(case, chatml_folder)
    assert problem in found
    assert bool(problem) == bool(found)
