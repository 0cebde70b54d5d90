"""Each metric is what its name says; one of the user's own that fails is named, and the others go on."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.errors import RecipeError
from pipelines.evaluation import metrics
from pipelines.evaluation.metrics import load_metrics, measure

OURS = ("chrf", "rouge_l", "bleu", "exact_match")
MINE = """
def length(answer, reference, prompt):
    return len(answer) - len(reference) + 100 * len(prompt)

def fails(answer, reference, prompt):
    raise KeyError("no such city")

def nothing(answer, reference, prompt):
    return None

def endless(answer, reference, prompt):
    return float("nan")

text = "no function"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of metrics, which no other test sees."""
    monkeypatch.setattr(metrics.sys, "path", list(metrics.sys.path))
    (tmp_path / "metrics_of_mine.py").write_text(MINE)
    yield tmp_path
    metrics.sys.modules.pop("metrics_of_mine", None)


def value(name: str, answer: str, reference: str) -> float:
    return measure(load_metrics([name], []), answer, reference, "")[0][name]


@pytest.mark.parametrize("name", OURS)
def test_an_equal_answer_has_a_hundred_and_none_has_nothing(name: str) -> None:
    assert value(name, "Return the number of items.", "Return the number of items.") == pytest.approx(100)
    assert value(name, "", "Return the number of items.") == 0
    assert value(name, "xyzzy", "Return the number of items.") == 0


def test_exact_match_forgives_blanks_around_an_answer_alone() -> None:
    assert value("exact_match", " 42\n", "42") == 100
    assert value("exact_match", "42", "42 ") == 100
    assert value("exact_match", "42.", "42") == 0
    assert value("exact_match", "Paris", "paris") == 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # "the cat sat" of three words out of five and of four: precision 3/5, recall 3/4
    assert value("rouge_l", "the big cat sat down", "the cat sat here") == pytest.approx(100 * 2 * 0.6 * 0.75 / 1.35, abs=1e-3)


def test_bleu_weighs_the_n_grams_that_an_answer_has() -> None:
    # two words: precisions 2/2 of words and 1/1 of pairs, and a penalty of exp(1 - 4/2) for being half as long
    assert value("bleu", "the cat", "the cat sat here") == pytest.approx(100 * math.exp(-1), abs=1e-3)


def test_chrf_counts_what_two_texts_share_letter_by_letter() -> None:
    assert 0 < value("chrf", "colour", "color") < 100
    assert value("chrf", "colours", "colour") > value("chrf", "cooler", "colour")


def test_a_metric_of_the_users_own_sees_answer_reference_and_prompt(folder: Path) -> None:
    values, errors = measure(load_metrics(["metrics_of_mine:length"], [folder]), "four", "twelve", "ab")
    assert (values, errors) == ({"metrics_of_mine:length": 198.0}, {})


def test_a_metric_that_fails_is_named_and_the_others_go_on(folder: Path) -> None:
    names = ["metrics_of_mine:fails", "chrf", "metrics_of_mine:nothing", "metrics_of_mine:endless", "exact_match"]
    values, errors = measure(load_metrics(names, [folder]), "a", "a", "")
    assert set(values) == {"chrf", "exact_match"}
    assert errors["metrics_of_mine:fails"] == "KeyError: 'no such city'"
    assert errors["metrics_of_mine:nothing"].startswith("TypeError: ")
    assert errors["metrics_of_mine:endless"] == "ValueError: the value is nan; return a finite number"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chrff", "evaluation.metrics has no 'chrff'; did you mean 'chrf'? it knows chrf, rouge_l, bleu, exact_match"),
        ("comet", "evaluation.metrics has no 'comet'; it knows chrf"),
        ("no_module_of_this_name:score", "put no_module_of_this_name.py into"),
        ("metrics_of_mine:missing", "cannot be imported (AttributeError"),
        ("metrics_of_mine:text", "is 'no function'; name a function of answer, reference and prompt"),
    ],
)
def test_a_metric_that_is_not_there_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_metrics([name], [folder])
    assert message in str(refused.value)
