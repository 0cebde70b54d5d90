"""Each metric is what its name says; one of the user's own that fails is named, and the others go on."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

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

def leaves(answer, reference, prompt):
    raise SystemExit("no tokens left")

def stopped(answer, reference, prompt):
    raise KeyboardInterrupt

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
    assert value(
        name, "Return the number of items.", "Return the number of items."
    ) == pytest.approx(100)
    assert value(name, "", "Return the number of items.") == 0
    assert value(name, "xyzzy", "Return the number of items.") == 0


def test_exact_match_forgives_blanks_around_an_answer_alone() -> None:
    assert value("exact_match", " 42\n", "42") == 100
    assert value("exact_match", "42", "42 ") == 100
    assert value("exact_match", "42.", "42") == 0
    assert value("exact_match", "Paris", "paris") == 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # "the cat sat" of three words out of five and of four: precision 3/5, recall 3/4
    assert value("rouge_l", "the big cat sat down", "the cat sat here") == pytest.approx(
        100 * 2 * 0.6 * 0.75 / 1.35, abs=1e-3
    )


@pytest.mark.parametrize(
    "text",
    [
        "Возвращает число строк",
        "返回列表中的项目数",
        "リストの長さを返す",
        "문자열을 반환합니다",
        "यह संख्या देता है",
        "∀x ∃y",
        "(a>1)",
    ],
)
def test_rouge_l_reads_every_script(text: str) -> None:
    assert value("rouge_l", text, text) == 100
    assert 0 < value("rouge_l", text, f"{text} {text}") < 100


def test_rouge_l_tells_symbols_apart() -> None:
    # "a", "1" of "a", ">", "1" and of "a", "<", "1"
    assert value("rouge_l", "a>1", "a<1") == pytest.approx(100 * 2 / 3, abs=1e-3)
    assert value("rouge_l", "返回一个列表", "返回一个数") == pytest.approx(100 * 8 / 11, abs=1e-3)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("The Quick brown fox jumps", "the quick red fox sleeps"),
        ("Return the number of items in a list", "It returns how many items the list has"),
        ("nothing in common", "Return 42 items"),
        ("a\tb\nc", "a  c"),
    ],
)
def test_rouge_l_of_plain_english_is_the_librarys_own(answer: str, reference: str) -> None:
    own = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert value("rouge_l", answer, reference) == pytest.approx(100 * own, abs=1e-3)


def test_bleu_weighs_the_n_grams_that_an_answer_has() -> None:
    # two words: precisions 2/2 of words and 1/1 of pairs, and a penalty of exp(1 - 4/2) for being half as long
    assert value("bleu", "the cat", "the cat sat here") == pytest.approx(
        100 * math.exp(-1), abs=1e-3
    )


def test_chrf_counts_what_two_texts_share_letter_by_letter() -> None:
    assert 0 < value("chrf", "colour", "color") < 100
    assert value("chrf", "colours", "colour") > value("chrf", "cooler", "colour")


def test_a_metric_of_the_users_own_sees_answer_reference_and_prompt(folder: Path) -> None:
    values, errors = measure(
        load_metrics(["metrics_of_mine:length"], [folder]), "four", "twelve", "ab"
    )
    assert (values, errors) == ({"metrics_of_mine:length": 198.0}, {})


def test_a_metric_that_fails_is_named_and_the_others_go_on(folder: Path) -> None:
    failing = [f"metrics_of_mine:{name}" for name in ("fails", "nothing", "endless", "leaves")]
    names = [*failing[:1], "chrf", *failing[1:], "exact_match"]
    values, errors = measure(load_metrics(names, [folder]), "a", "a", "")
    assert set(values) == {"chrf", "exact_match"}
    assert errors["metrics_of_mine:fails"] == "KeyError: 'no such city'"
    assert errors["metrics_of_mine:nothing"].startswith("TypeError: ")
    assert (
        errors["metrics_of_mine:endless"] == "ValueError: the value is nan; return a finite number"
    )
    assert errors["metrics_of_mine:leaves"] == "SystemExit: no tokens left"


def test_who_stops_a_run_stops_it(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(load_metrics(["metrics_of_mine:stopped"], [folder]), "a", "a", "")


@pytest.mark.parametrize(
    "code", ["import sys; sys.exit(3)", "undefined_name", "open('/no/such/file')"]
)
def test_a_module_that_fails_is_refused_by_name(folder: Path, code: str) -> None:
    (folder / "metrics_that_fail.py").write_text(code)
    with pytest.raises(
        RecipeError,
        match=r"'metrics_that_fail:rate' cannot be imported \((SystemExit|NameError|FileNotFoundError): ",
    ):
        load_metrics(["metrics_that_fail:rate"], [folder])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "chrff",
            "evaluation.metrics has no 'chrff'; did you mean 'chrf'? it knows chrf, rouge_l, bleu, exact_match",
        ),
        ("comet", "evaluation.metrics has no 'comet'; it knows chrf"),
        ("no_module_of_this_name:score", "put no_module_of_this_name.py into"),
        ("metrics_of_mine:missing", "cannot be imported (AttributeError"),
        (
            "metrics_of_mine:text",
            "is 'no function'; name a function of answer, reference and prompt",
        ),
    ],
)
def test_a_metric_that_is_not_there_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_metrics([name], [folder])
    assert message in str(refused.value)
