"""Each metric matches its definition; a custom one that fails is named, and the others continue."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from pipelines.errors import RecipeError
from pipelines.evaluation import metrics
from pipelines.evaluation.metrics import load_metrics, measure

BUILT_IN = ("chrf", "rouge_l", "bleu", "exact_match")
CUSTOM = """
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
    (tmp_path / "custom_metrics.py").write_text(CUSTOM)
    yield tmp_path
    metrics.sys.modules.pop("custom_metrics", None)


def value(name: str, answer: str, reference: str) -> float:
    return measure(load_metrics([name], []), answer, reference, "")[0][name]


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_equal_answer_scores_100_and_an_empty_one_0(name: str) -> None:
    reference = "Return the number of items."
    assert value(name, reference, reference) == pytest.approx(100)
    assert value(name, "", reference) == 0
    assert value(name, "xyzzy", reference) == 0


def test_exact_match_ignores_only_blanks_around_an_answer() -> None:
    assert value("exact_match", " 42\n", "42") == 100
    assert value("exact_match", "42", "42 ") == 100
    assert value("exact_match", "42.", "42") == 0
    assert value("exact_match", "Paris", "paris") == 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # "the cat sat" of three words out of five and of four: precision 3/5, recall 3/4
    expected = 100 * 2 * 0.6 * 0.75 / 1.35
    found = value("rouge_l", "the big cat sat down", "the cat sat here")
    assert found == pytest.approx(expected, abs=1e-3)


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


def test_rouge_l_distinguishes_symbols() -> None:
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
def test_rouge_l_of_plain_english_equals_that_of_the_library(answer: str, reference: str) -> None:
    own = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert value("rouge_l", answer, reference) == pytest.approx(100 * own, abs=1e-3)


def test_bleu_uses_only_n_grams_up_to_the_length_of_the_answer() -> None:
    # two words: precisions 2/2 of words and 1/1 of pairs, and a penalty of exp(1 - 4/2) for half
    # the length
    found = value("bleu", "the cat", "the cat sat here")
    assert found == pytest.approx(100 * math.exp(-1), abs=1e-3)


def test_chrf_counts_shared_character_n_grams() -> None:
    assert 0 < value("chrf", "colour", "color") < 100
    assert value("chrf", "colours", "colour") > value("chrf", "cooler", "colour")


def test_a_custom_metric_receives_answer_reference_and_prompt(folder: Path) -> None:
    custom = load_metrics(["custom_metrics:length"], [folder])
    values, errors = measure(custom, "four", "twelve", "ab")
    assert (values, errors) == ({"custom_metrics:length": 198.0}, {})


def test_a_metric_that_fails_is_named_and_the_others_continue(folder: Path) -> None:
    failing = [f"custom_metrics:{name}" for name in ("fails", "nothing", "endless", "leaves")]
    names = [*failing[:1], "chrf", *failing[1:], "exact_match"]
    values, errors = measure(load_metrics(names, [folder]), "a", "a", "")
    assert set(values) == {"chrf", "exact_match"}
    assert errors["custom_metrics:fails"] == "KeyError: 'no such city'"
    assert errors["custom_metrics:nothing"].startswith("TypeError: ")
    not_finite = errors["custom_metrics:endless"]
    assert not_finite == "ValueError: the value is nan; return a finite number"
    assert errors["custom_metrics:leaves"] == "SystemExit: no tokens left"


def test_a_keyboard_interrupt_in_a_metric_stops_the_run(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(load_metrics(["custom_metrics:stopped"], [folder]), "a", "a", "")


@pytest.mark.parametrize(
    "code", ["import sys; sys.exit(3)", "undefined_name", "open('/no/such/file')"]
)
def test_a_module_that_fails_is_refused_by_name(folder: Path, code: str) -> None:
    (folder / "metrics_that_fail.py").write_text(code)
    errors = "(SystemExit|NameError|FileNotFoundError)"
    message = rf"'metrics_that_fail:rate' cannot be imported \({errors}: "
    with pytest.raises(RecipeError, match=message):
        load_metrics(["metrics_that_fail:rate"], [folder])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "chrff",
            "evaluation.metrics has no 'chrff'; did you mean 'chrf'? use one of chrf, rouge_l, "
            "bleu, exact_match, or a custom",
        ),
        ("comet", "evaluation.metrics has no 'comet'; use one of chrf"),
        ("no_module_of_this_name:score", "put no_module_of_this_name.py into"),
        ("custom_metrics:missing", "cannot be imported (AttributeError"),
        (
            "custom_metrics:text",
            "is 'no function'; name a function of answer, reference and prompt",
        ),
    ],
)
def test_a_metric_that_does_not_exist_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_metrics([name], [folder])
    assert message in str(refused.value)
