"""Evaluation items are found in training data by their runs of words."""

from pathlib import Path

import pytest
from lm_eval_tasks import settings

from pipelines.evaluation.contamination import MIN_WORDS, RUN_WORDS, ItemText, contaminated
from pipelines.evaluation.harness import load_tasks
from pipelines.evaluation.items import choice_item

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "while",
    "seven",
    "small",
    "birds",
    "watch",
    "it",
    "go",
    "by",
]
ITEM = ItemText.of(choice_item("boxes", "boxes/0", " ".join(WORDS[:-1]), [WORDS[-1], "away"], 0))


def short_item(words: int) -> ItemText:
    question = " ".join(WORDS[: words - 1])
    return ItemText.of(choice_item("short", "short/0", question, [WORDS[words - 1]], 0))


def test_an_item_is_found_inside_a_longer_text() -> None:
    text = "Before it, a sentence. " + " ".join(WORDS).upper() + "! And another after it."
    assert contaminated([ITEM], ["Nothing here.", text]) == {"boxes": 1}


def test_a_run_of_words_of_an_item_is_enough() -> None:
    run = " ".join(WORDS[2 : 2 + RUN_WORDS])
    assert contaminated([ITEM], [run]) == {"boxes": 1}
    assert contaminated([ITEM], [" ".join(WORDS[2 : 1 + RUN_WORDS])]) == {}


def test_the_wrong_answers_of_an_item_are_not_searched_for() -> None:
    wrong = " ".join([*WORDS[-RUN_WORDS:-1], "away"])
    assert contaminated([ITEM], [wrong]) == {}


@pytest.mark.parametrize(("words", "found"), [(MIN_WORDS, {"short": 1}), (MIN_WORDS - 1, {})])
def test_a_short_item_counts_only_if_it_has_enough_words(words: int, found: dict[str, int]) -> None:
    assert contaminated([short_item(words)], [" ".join(WORDS)]) == found


def test_an_item_counts_once_however_often_it_occurs() -> None:
    text = " ".join(WORDS)
    assert contaminated([ITEM, short_item(MIN_WORDS)], [text, text]) == {"boxes": 1, "short": 1}


def test_documents_of_lm_eval_tasks_are_searched_for(tasks_folder: Path) -> None:
    texts = list(load_tasks(settings("chosen", "read"), 7, [tasks_folder]).texts())
    assert texts[1] == ("chosen", "Say north 1.\nAnswer: green")
    assert texts[-1] == ("read", " Say left 5. left look on Say left 5. left look on")
    items = [ItemText(name, text) for name, text in texts]
    training_text = "Well: say east 3. East look on. Say east 3. East look on."
    assert contaminated(items, [training_text]) == {"read": 1}
