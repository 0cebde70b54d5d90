"""The documents of an lm-eval task are checked before any model is loaded."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from lm_eval_tasks import (
    DOCS,
    TASKS,
    Values,
    changed_docs,
    settings,
    write_docs,
    write_task,
)

from pipelines.errors import DataError, RecipeError
from pipelines.evaluation.harness import load_tasks

pytestmark = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed; it is an extra"
)
RecordsOf = Callable[..., list[Values]]


@pytest.mark.parametrize(
    ("task", "docs", "fragments"),
    [
        (
            "chosen",
            changed_docs(2, right=7),
            [
                "document 2 ",
                "7 as its right answer (doc_to_target)",
                "'south blue up'",
                "from 0 to 2",
            ],
        ),
        ("chosen", changed_docs(2, right=-1), ["document 2 ", "-1 as its right answer"]),
        (
            "chosen",
            changed_docs(2, right=None),
            ["document 2 ", "nothing as its 'right', which doc_to_target would show"],
        ),
        (
            "chosen",
            changed_docs(3, question=None),
            ["document 3 ", "nothing as its 'question', which doc_to_text would show as 'None'"],
        ),
        ("chosen", changed_docs(0, question=None), ["document 0 ", "'question'"]),
        (
            "chosen",
            changed_docs(1, answers=None),
            ["document 1 ", "nothing as its 'answers', which doc_to_choice would show"],
        ),
        (
            "chosen",
            changed_docs(1, answers=["red", ""]),
            ["document 1 ", "['red', ''] as its doc_to_choice"],
        ),
        ("continued", changed_docs(4, text=None), ["document 4 ", "nothing as its 'text'"]),
        ("written", changed_docs(4, text=None), ["document 4 ", "nothing as its 'text'"]),
        ("read", changed_docs(5, text=None), ["document 5 ", "nothing as its 'text'"]),
    ],
)
def test_an_invalid_document_is_refused_before_any_model_is_loaded(
    tasks_folder: Path, task: str, docs: list[Values], fragments: list[str]
) -> None:
    write_docs(tasks_folder / "docs.jsonl", docs)
    with pytest.raises(DataError) as refused:
        load_tasks(settings(task), 7, [tasks_folder])
    for fragment in (f"of the lm-eval task {task!r}", *fragments):
        assert fragment in str(refused.value)


def test_a_document_beyond_the_limit_is_not_checked(tasks_folder: Path) -> None:
    write_docs(tasks_folder / "docs.jsonl", changed_docs(2, right=7))
    assert load_tasks(settings("chosen", limit=2), 7, [tasks_folder]).names == ["chosen"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"doc_to_target": "rigth"},
            "document 0 of the lm-eval task 'odd' has 'rigth' as its right answer",
        ),
        (
            {"doc_to_target": "{{[right, 3]}}"},
            "document 0 of the lm-eval task 'odd' has 3 as its right answer",
        ),
        (
            {"doc_to_text": "{% if right == 2 %}{{ qestion }}{% else %}{{ question }}{% endif %}"},
            "document 2 .* does not fit doc_to_text",
        ),
        ({"doc_to_choice": "{{answers|first}}"}, "SyntaxError|NameError|ValueError"),
    ],
)
def test_an_invalid_template_is_refused(tasks_folder: Path, change: Values, message: str) -> None:
    write_task(tasks_folder, "odd", {**TASKS["chosen"], **change})
    with pytest.raises((DataError, RecipeError), match=message):
        load_tasks(settings("odd"), 7, [tasks_folder])


def test_an_empty_field_that_is_not_shown_is_accepted(
    tasks_folder: Path, records_of: RecordsOf
) -> None:
    docs = [{**doc, "hint": "No color.", "question": "None of it?"} for doc in DOCS]
    del docs[0]["hint"]
    write_docs(tasks_folder / "docs.jsonl", docs)
    text = "{% if hint is not none %}{{ hint }} {% endif %}{{ question }}"
    write_task(tasks_folder, "hinted", {**TASKS["chosen"], "doc_to_text": text})
    assert [record.kind for record in records_of("hinted")] == ["general"] * len(DOCS)


def test_a_right_answer_may_be_named_by_its_text(tasks_folder: Path, records_of: RecordsOf) -> None:
    write_task(tasks_folder, "named", {**TASKS["chosen"], "doc_to_target": "{{answers[right]}}"})
    gold = [record.gold for record in records_of("chosen")]
    assert [record.gold for record in records_of("named")] == gold


def test_invalid_few_shot_examples_are_refused(tasks_folder: Path) -> None:
    write_docs(tasks_folder / "shown.jsonl", [{**doc, "right": 5} for doc in DOCS])
    files = {
        "dataset_kwargs": {"data_files": {"test": "docs.jsonl", "train": "shown.jsonl"}},
        "fewshot_split": "train",
    }
    write_task(tasks_folder, "odd", {**TASKS["shown"], **files})
    message = "the prompts of the lm-eval task 'odd' cannot be built .*; fix its few-shot examples"
    with pytest.raises(DataError, match=message):
        load_tasks(settings("odd"), 7, [tasks_folder])
