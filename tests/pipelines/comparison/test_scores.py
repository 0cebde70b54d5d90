"""Each metric of a model equals a value computed by hand on a small case."""

from collections.abc import Callable
from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu import corpus_bleu, corpus_chrf

from pipelines.comparison.record_types import ChoiceRecord, ItemRecord
from pipelines.comparison.scores import (
    LENGTH_NORMALIZED,
    BenchmarkScores,
    accuracy,
    choice_probability,
    margin,
    metric_errors,
    scores,
)

Records = list[ItemRecord]
Maker = Callable[..., Records]
Leave = Callable[[Records, str], Records]
log_likelihoods = st.lists(st.floats(-300, 0), min_size=2, max_size=5)


def question(
    values: list[float], *, gold: int = 0, benchmark: str = "piqa", **changes: Any
) -> ChoiceRecord:
    record = ChoiceRecord(
        id=f"{benchmark}/0",
        benchmark=benchmark,
        prompt_sha256="digest",
        gold=gold,
        log_likelihoods=tuple(values),
        bytes=(1,) * len(values),
        greedy=(False,) * len(values),
    )
    return replace(record, **changes)


@pytest.mark.parametrize("shift", [0.0, -1000.0, 700.0])
def test_choice_probability_is_the_fraction_of_the_right_answer(shift: float) -> None:
    record = question([log(0.2) + shift, log(0.05) + shift, log(0.15) + shift])
    assert choice_probability(record) == pytest.approx(0.5)
    assert choice_probability(replace(record, gold=2)) == pytest.approx(0.375)


@given(log_likelihoods)
def test_choice_probabilities_of_all_answers_sum_to_one(values: list[float]) -> None:
    records = [question(values, gold=gold) for gold in range(len(values))]
    assert sum(choice_probability(record) for record in records) == pytest.approx(1)


@given(log_likelihoods, st.floats(0, 50))
def test_an_equal_gain_of_all_answers_changes_neither_probability_nor_margin(
    values: list[float], gain: float
) -> None:
    """A likelihood alone would count this as ability: right and wrong answers gained the same."""
    before = question(values)
    after = question([value + gain for value in values])
    assert choice_probability(after) == pytest.approx(choice_probability(before), abs=1e-9)
    assert margin(after) == pytest.approx(margin(before), abs=1e-9)


@given(log_likelihoods)
def test_a_positive_margin_is_a_right_answer(values: list[float]) -> None:
    record = question(values)
    assert margin(record) <= 0 or accuracy(record) == 1
    assert margin(record) >= 0 or accuracy(record) == 0


def test_an_answer_without_wrong_ones_has_probability_one_and_no_margin() -> None:
    assert choice_probability(question([-5.0])) == 1
    assert margin(question([-5.0])) == 0


@pytest.mark.parametrize("benchmark", LENGTH_NORMALIZED)
def test_answers_of_different_length_are_compared_per_byte(benchmark: str) -> None:
    record = question([-4.0, -6.0], bytes=(2, 6), benchmark=benchmark)
    assert accuracy(replace(record, gold=1)) == 1
    assert accuracy(replace(record, gold=0)) == 0


def test_winogrande_answers_are_compared_without_normalization() -> None:
    record = question([-4.0, -6.0], bytes=(2, 6), benchmark="winogrande")
    assert accuracy(replace(record, gold=0)) == 1
    assert accuracy(replace(record, gold=1)) == 0


@pytest.mark.parametrize(
    ("greedy", "right"), [((True, False), 1), ((False, True), 0), ((False, False), 0)]
)
def test_a_lambada_answer_is_right_if_it_is_the_greedy_one(
    greedy: tuple[bool, ...], right: float
) -> None:
    assert accuracy(question([-1.0, -9.0], benchmark="lambada", greedy=greedy)) == right


def test_the_margin_is_per_byte_and_relative_to_the_best_wrong_answer() -> None:
    record = question([-4.0, -6.0, -3.0], bytes=(2, 4, 1))
    assert margin(record) == pytest.approx(-2.0 - -1.5)
    assert margin(replace(record, gold=1)) == pytest.approx(-1.5 - -2.0)
    assert record.log_likelihoods == (-4.0, -6.0, -3.0)


def test_the_task_loss_is_per_token(task_records: Maker) -> None:
    result = scores(task_records([3.0, 1.0], [2, 6]))
    assert result.task_loss == pytest.approx((6 + 6) / 8)
    assert result.perplexity == pytest.approx(exp(1.5))


def test_benchmarks_have_equal_weight(task_records: Maker, general_records: Maker) -> None:
    piqa = general_records("piqa", [0.4, 0.4, 0.4])
    arc_easy = general_records("arc_easy", [0.8])
    result = scores(task_records([1.0]) + piqa + arc_easy)
    assert result.choice_probability == pytest.approx(0.6)
    assert result.accuracy == pytest.approx(0.5)
    assert result.margin == pytest.approx((log(0.4 / 0.6) + log(0.8 / 0.2)) / 4 / 2)
    assert result.benchmarks == {
        "piqa": BenchmarkScores(pytest.approx(0.4), accuracy=0.0, items=3, left_out=0),
        "arc_easy": BenchmarkScores(pytest.approx(0.8), accuracy=1.0, items=1, left_out=0),
    }


def test_a_left_out_item_is_counted_and_not_part_of_a_mean(
    task_records: Maker, general_records: Maker, without: Leave
) -> None:
    records = task_records([1.0]) + general_records("piqa", [0.4, 0.9, 0.6])
    result = scores(without(records, "piqa/1"))
    assert result.choice_probability == pytest.approx(0.5)
    assert result.benchmarks["piqa"].items == 2
    assert result.benchmarks["piqa"].left_out == 1


def test_a_benchmark_without_items_left_is_listed_without_metrics(
    task_records: Maker, general_records: Maker, without: Leave
) -> None:
    records = task_records([1.0]) + general_records("piqa", [0.4])
    result = scores(without(records, "piqa/0"))
    assert result.benchmarks == {"piqa": BenchmarkScores(None, None, items=0, left_out=1)}
    assert result.choice_probability is None
    assert result.accuracy is None
    assert result.margin is None


def test_questions_without_choices_have_accuracy_only(
    task_records: Maker, general_records: Maker, probe_records: Maker, score_records: Maker
) -> None:
    result = scores(
        task_records([1.0])
        + general_records("piqa", [0.4, 0.8])
        + probe_records("capitals", [True, False, False, False])
        + score_records("perplexity", [10.0, 20.0], higher_is_better=False)
    )
    assert result.benchmarks["capitals"] == BenchmarkScores(None, 0.25, items=4, left_out=0)
    assert result.benchmarks["perplexity"] == BenchmarkScores(None, -15.0, items=2, left_out=0)
    assert result.choice_probability == pytest.approx(0.6)
    assert result.accuracy == pytest.approx((0.5 + 0.25) / 2)


def test_the_accuracy_is_the_mean_score_if_all_tasks_have_their_own_score(
    task_records: Maker, score_records: Maker
) -> None:
    result = scores(task_records([1.0]) + score_records("f1", [0.2, 0.6]))
    assert result.choice_probability is None
    assert result.accuracy == pytest.approx(0.4)
    assert result.margin is None


def test_the_text_loss_is_per_byte_and_the_chat_loss_per_token(
    task_records: Maker, loss_records: Maker
) -> None:
    texts = loss_records("text", [10.0, 20.0])
    chats = loss_records("chat", [10.0, 15.0])
    result = scores(task_records([1.0]) + texts + chats)
    assert result.text_loss == pytest.approx(30 / 40)
    assert result.chat_loss == pytest.approx(25 / 10)
    assert result.benchmarks == {}


def test_what_was_not_evaluated_is_none(task_records: Maker) -> None:
    result = scores(task_records([1.0]), ("chrf", "bleu"))
    assert result.text_loss is None
    assert result.chat_loss is None
    assert result.choice_probability is None
    assert result.generation == {"chrf": None, "bleu": None}
    assert result.corpus == {"bleu": None, "chrf": None}


def test_failed_metrics_are_counted_and_not_part_of_a_mean(
    task_records: Maker, generation_records: Maker
) -> None:
    answers = generation_records([{"chrf": 20.0, "mine:rate": 1.0}, {"chrf": 40.0}])
    errors = {
        "mine:rate": "ZeroDivisionError: division by zero",
        "execution": "no such program",
    }
    answers[1] = replace(answers[1], errors=errors)
    result = scores(task_records([1.0]) + answers, ("chrf",))
    assert result.generation == {"chrf": 30.0, "mine:rate": 1.0, "execution": None}
    assert result.errors == {"mine:rate": 1, "execution": 1}
    assert metric_errors(answers) == (
        "mine:rate of answer 1: ZeroDivisionError: division by zero",
        "execution of answer 1: no such program",
    )


def test_unfinished_answers_are_counted(task_records: Maker, generation_records: Maker) -> None:
    finished = generation_records([{"chrf": 1.0}] * 2)
    unfinished = generation_records([{"chrf": 1.0}] * 3, ended=False)
    assert scores(task_records([1.0]) + finished + unfinished).unfinished_answers == 3


def test_bleu_and_chrf_of_all_answers_equal_sacrebleus(
    task_records: Maker, generation_records: Maker
) -> None:
    texts = ["the cat sat on a mat", "", "a dog, as ever, ran off"]
    answers = []
    for answer, text in zip(generation_records([{}] * 3), texts, strict=True):
        answers.append(replace(answer, answer=text))
    references = [[answer.reference for answer in answers]]
    assert scores(task_records([1.0]) + answers).corpus == {
        "bleu": corpus_bleu(texts, references).score,
        "chrf": corpus_chrf(texts, references).score,
    }


def test_bleu_and_chrf_of_a_perfect_answer_are_100(
    task_records: Maker, generation_records: Maker
) -> None:
    corpus = scores(task_records([1.0]) + generation_records([{}])).corpus
    assert corpus == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
