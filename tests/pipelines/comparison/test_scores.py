"""Every figure of a model by hand on a small case, and what each can and cannot see."""

from collections.abc import Callable
from math import exp, log
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu import corpus_bleu, corpus_chrf

from pipelines.comparison.scores import (
    LENGTH_NORMALISED,
    accuracy,
    choice_probability,
    margin,
    metric_errors,
    scores,
)

Values = dict[str, Any]
Records = list[Values]
Maker = Callable[..., Records]
Leave = Callable[[Records, str], Records]
log_likelihoods = st.lists(st.floats(-300, 0), min_size=2, max_size=5)


def question(
    values: list[float], *, gold: int = 0, benchmark: str = "piqa", **changes: Any
) -> Values:
    sizes = [1] * len(values)
    one = {
        "kind": "general",
        "benchmark": benchmark,
        "gold": gold,
        "bytes": sizes,
        "greedy": [False] * len(sizes),
    }
    return {**one, "log_likelihoods": values, **changes}


@pytest.mark.parametrize("shift", [0.0, -1000.0, 700.0])
def test_choice_probability_is_the_share_of_the_right_answer(shift: float) -> None:
    record = question([log(0.2) + shift, log(0.05) + shift, log(0.15) + shift])
    assert choice_probability(record) == pytest.approx(0.5)
    assert choice_probability({**record, "gold": 2}) == pytest.approx(0.375)


@given(log_likelihoods)
def test_choice_probabilities_of_all_answers_add_up_to_one(values: list[float]) -> None:
    assert sum(
        choice_probability(question(values, gold=gold)) for gold in range(len(values))
    ) == pytest.approx(1)


@given(log_likelihoods, st.floats(0, 50))
def test_text_that_became_likelier_as_a_whole_moves_neither_choice_probability_nor_margin(
    values: list[float], rise: float
) -> None:
    """What a likelihood by itself mistakes for ability: every answer, right or wrong, gained as much."""
    before, after = question(values), question([value + rise for value in values])
    assert choice_probability(after) == pytest.approx(choice_probability(before), abs=1e-9)
    assert margin(after) == pytest.approx(margin(before), abs=1e-9)


@given(log_likelihoods)
def test_a_positive_margin_is_a_right_answer(values: list[float]) -> None:
    record = question(values)
    assert margin(record) <= 0 or accuracy(record) == 1
    assert margin(record) >= 0 or accuracy(record) == 0


def test_an_answer_without_wrong_ones_says_nothing() -> None:
    assert choice_probability(question([-5.0])) == 1
    assert margin(question([-5.0])) == 0


@pytest.mark.parametrize("benchmark", LENGTH_NORMALISED)
def test_answers_of_unlike_length_are_compared_by_byte(benchmark: str) -> None:
    record = question([-4.0, -6.0], bytes=[2, 6], benchmark=benchmark)
    assert accuracy({**record, "gold": 1}) == 1
    assert accuracy({**record, "gold": 0}) == 0


def test_answers_of_winogrande_are_compared_as_they_are() -> None:
    record = question([-4.0, -6.0], bytes=[2, 6], benchmark="winogrande")
    assert (accuracy({**record, "gold": 0}), accuracy({**record, "gold": 1})) == (1, 0)


@pytest.mark.parametrize(
    ("greedy", "right"), [([True, False], 1), ([False, True], 0), ([False, False], 0)]
)
def test_an_answer_of_lambada_is_right_where_it_is_the_likeliest_of_all_words(
    greedy: list[bool], right: float
) -> None:
    assert accuracy(question([-1.0, -9.0], benchmark="lambada", greedy=greedy)) == right


def test_the_margin_is_per_byte_and_to_the_best_wrong_answer() -> None:
    record = question([-4.0, -6.0, -3.0], bytes=[2, 4, 1])
    assert margin(record) == pytest.approx(-2.0 - -1.5)
    assert margin({**record, "gold": 1}) == pytest.approx(-1.5 - -2.0)
    assert record["log_likelihoods"] == [-4.0, -6.0, -3.0]


def test_the_task_loss_weighs_tokens_and_not_examples(task_records: Maker) -> None:
    figures = scores(task_records([3.0, 1.0], [2, 6]))
    assert figures.task_loss == pytest.approx((6 + 6) / 8)
    assert figures.perplexity == pytest.approx(exp(1.5))


def test_benchmarks_weigh_the_same_however_many_items_they_have(
    task_records: Maker, general_records: Maker
) -> None:
    figures = scores(
        task_records([1.0])
        + general_records("piqa", [0.4, 0.4, 0.4])
        + general_records("arc_easy", [0.8])
    )
    assert figures.choice_probability == pytest.approx(0.6)
    assert figures.accuracy == pytest.approx(0.5)
    assert figures.margin == pytest.approx((log(0.4 / 0.6) + log(0.8 / 0.2)) / 4 / 2)
    piqa, arc = figures.benchmarks["piqa"], figures.benchmarks["arc_easy"]
    assert (piqa.choice_probability, piqa.accuracy, piqa.items, piqa.left_out) == (
        pytest.approx(0.4),
        0.0,
        3,
        0,
    )
    assert (arc.choice_probability, arc.accuracy, arc.items, arc.left_out) == (
        pytest.approx(0.8),
        1.0,
        1,
        0,
    )


def test_what_was_left_out_is_counted_and_has_no_part_in_a_mean(
    task_records: Maker, general_records: Maker, without: Leave
) -> None:
    figures = scores(
        without(task_records([1.0]) + general_records("piqa", [0.4, 0.9, 0.6]), "piqa/1")
    )
    assert figures.choice_probability == pytest.approx(0.5)
    assert (figures.benchmarks["piqa"].items, figures.benchmarks["piqa"].left_out) == (2, 1)


def test_a_benchmark_of_which_nothing_is_left_is_named_without_figures(
    task_records: Maker, general_records: Maker, without: Leave
) -> None:
    figures = scores(without(task_records([1.0]) + general_records("piqa", [0.4]), "piqa/0"))
    piqa = figures.benchmarks["piqa"]
    assert (piqa.choice_probability, piqa.accuracy, piqa.items, piqa.left_out) == (None, None, 0, 1)
    assert (figures.choice_probability, figures.accuracy, figures.margin) == (None, None, None)


def test_questions_without_choices_have_accuracy_only(
    task_records: Maker, general_records: Maker, probe_records: Maker, score_records: Maker
) -> None:
    records = (
        task_records([1.0])
        + general_records("piqa", [0.4, 0.8])
        + probe_records("capitals", [True, False, False, False])
    )
    figures = scores(records + score_records("perplexity", [10.0, 20.0], higher_is_better=False))
    assert (
        figures.benchmarks["capitals"].choice_probability,
        figures.benchmarks["capitals"].accuracy,
    ) == (None, 0.25)
    assert (
        figures.benchmarks["perplexity"].choice_probability,
        figures.benchmarks["perplexity"].accuracy,
    ) == (None, -15.0)
    assert figures.choice_probability == pytest.approx(0.6)
    assert figures.accuracy == pytest.approx((0.5 + 0.25) / 2)


def test_where_tasks_only_rate_themselves_their_scores_are_the_accuracy(
    task_records: Maker, score_records: Maker
) -> None:
    figures = scores(task_records([1.0]) + score_records("f1", [0.2, 0.6]))
    assert (figures.choice_probability, figures.accuracy, figures.margin) == (
        None,
        pytest.approx(0.4),
        None,
    )


def test_losses_of_text_and_chats_are_per_byte_and_per_token(
    task_records: Maker, loss_records: Maker
) -> None:
    figures = scores(
        task_records([1.0])
        + loss_records("text", [10.0, 20.0])
        + loss_records("chat", [10.0, 15.0])
    )
    assert (figures.text_loss, figures.chat_loss) == (
        pytest.approx(30 / 40),
        pytest.approx(25 / 10),
    )
    assert figures.benchmarks == {}


def test_what_was_not_asked_is_none(task_records: Maker) -> None:
    figures = scores(task_records([1.0]), ("chrf", "bleu"))
    assert (figures.text_loss, figures.chat_loss, figures.choice_probability) == (None, None, None)
    assert figures.generation == {"chrf": None, "bleu": None}
    assert figures.corpus == {"bleu": None, "chrf": None}


def test_metrics_of_answers_have_a_mean_and_what_failed_is_counted(
    task_records: Maker, generation_records: Maker
) -> None:
    answers = generation_records([{"chrf": 20.0, "mine:rate": 1.0}, {"chrf": 40.0}])
    answers[1]["errors"] = {
        "mine:rate": "ZeroDivisionError: division by zero",
        "execution": "no such program",
    }
    figures = scores(task_records([1.0]) + answers, ("chrf",))
    assert figures.generation == {"chrf": 30.0, "mine:rate": 1.0, "execution": None}
    assert figures.errors == {"mine:rate": 1, "execution": 1}
    assert metric_errors(answers) == (
        "mine:rate of answer 1: ZeroDivisionError: division by zero",
        "execution of answer 1: no such program",
    )


def test_answers_that_did_not_end_are_counted(
    task_records: Maker, generation_records: Maker
) -> None:
    ended, cut = (
        generation_records([{"chrf": 1.0}] * 2),
        generation_records([{"chrf": 1.0}] * 3, ended=False),
    )
    assert scores(task_records([1.0]) + ended + cut).unfinished_answers == 3


def test_bleu_and_chrf_of_all_answers_are_sacrebleu_s(
    task_records: Maker, generation_records: Maker
) -> None:
    answers = generation_records([{}] * 3)
    said = ["the cat sat on a mat", "", "a dog, as ever, ran off"]
    for answer, text in zip(answers, said, strict=True):
        answer["answer"] = text
    references = [[answer["reference"] for answer in answers]]
    corpus = scores(task_records([1.0]) + answers).corpus
    assert corpus == {
        "bleu": corpus_bleu(said, references).score,
        "chrf": corpus_chrf(said, references).score,
    }
    assert scores(task_records([1.0]) + generation_records([{}])).corpus == {
        "bleu": pytest.approx(100),
        "chrf": pytest.approx(100),
    }
