"""One model's metrics, from its item records.

    task loss             learning: nats per supervised token of the held-out examples
    choice probability    forgetting: p(right) / Σ p(choice), for multiple-choice questions
    accuracy              forgetting, coarser: whether the right answer is the likeliest
    margin                forgetting: log-likelihood per byte, right answer over best wrong one
    text loss, chat loss  style: plain passages, and right answers formatted as chats

A likelihood alone does not show forgetting: the base is an instruct model, and any training on
plain text makes plain text likelier, right and wrong answers alike. Text and chat loss are
therefore shown and never judged. Accuracy changes only if a ranking flips, so some hundred items
cannot show a change (Schaeffer et al. 2024, arXiv 2406.04391, on which scores change smoothly).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from pipelines.comparison.record_types import (
    AbilityRecord,
    ChatRecord,
    ChoiceRecord,
    GenerationRecord,
    LossRecord,
    PassageRecord,
    ScoreRecord,
    SingleAnswerRecord,
    TaskRecord,
)
from pipelines.comparison.records import (
    ABILITIES,
    Ability,
    Records,
    ability_benchmarks,
    by_benchmark,
    left_out,
    of_type,
)

LENGTH_NORMALIZED = ("hellaswag", "piqa", "arc_easy", "openbookqa")
"""Benchmarks whose accuracy divides by the answer's bytes; the others compare answers of one or two
tokens, or the same text."""


@dataclass(frozen=True)
class BenchmarkScores:
    """One model's metrics on one benchmark."""

    choice_probability: float | None
    """None if its questions have no choices."""
    accuracy: float | None
    """Fraction of right answers; for a task with its own score, the mean score, negated if lower is
    better; None without items."""
    items: int
    left_out: int


@dataclass(frozen=True)
class Scores:
    """One model's metrics; None if nothing was evaluated for a metric."""

    task_loss: float
    """Nats per supervised token of the held-out examples."""
    perplexity: float
    """e to the task loss."""
    generation: dict[str, float | None]
    """Metric → its mean over the answers that have it."""
    corpus: dict[str, float | None]
    """bleu and chrf of all answers as one text, from 0 to 100."""
    unfinished_answers: int
    """Answers that stopped at the maximum length."""
    choice_probability: float | None
    """Mean p(right) / Σ p(choice); the mean of the benchmarks' means."""
    accuracy: float | None
    """Fraction of right answers; the mean of the benchmarks' fractions."""
    margin: float | None
    """Log-likelihood per byte of the right answer over the best wrong one."""
    text_loss: float | None
    """Nats per byte of plain text."""
    chat_loss: float | None
    """Nats per token of right answers, formatted as chats."""
    benchmarks: dict[str, BenchmarkScores]
    errors: dict[str, int]
    """Metric → number of answers for which it could not be computed."""


def scores(records: Records, metrics: Sequence[str] = ()) -> Scores:
    """Summarize one model's item records.

    Args:
        records: in the order of evaluation.
        metrics: names of the requested metrics; they are None if nothing was generated.
    """
    answers = of_type(records, GenerationRecord)
    choices = by_benchmark(records, ChoiceRecord)
    loss = _loss(of_type(records, TaskRecord))
    assert loss is not None, "evaluation scores held-out examples"
    return Scores(
        task_loss=loss,
        perplexity=exp(loss),
        generation=_generation(answers, metrics),
        corpus=_corpus(answers),
        unfinished_answers=sum(not answer.ended for answer in answers),
        choice_probability=_mean_over_benchmarks(choices, choice_probability),
        accuracy=_mean_over_benchmarks(accuracy_benchmarks(records), accuracy),
        margin=_mean_over_benchmarks(choices, margin),
        text_loss=_loss(of_type(records, PassageRecord)),
        chat_loss=_loss(of_type(records, ChatRecord)),
        benchmarks=_benchmarks(records),
        errors=_error_counts(answers),
    )


def choice_probability(record: ChoiceRecord) -> float:
    """Return p(right) / Σ p(choice)."""
    highest = max(record.log_likelihoods)
    probabilities = [exp(value - highest) for value in record.log_likelihoods]
    return probabilities[record.gold] / sum(probabilities)


def accuracy(record: AbilityRecord) -> float:
    """Return 1 for a right and 0 for a wrong answer; for a task with its own score, that score.

    An answer is right if it is the likeliest of its choices: per byte, or in total. In LAMBADA, and
    if there are no choices, it must be the likeliest of all texts. A score is negated if lower is
    better.
    """
    if isinstance(record, ScoreRecord):
        return record.value if record.higher_is_better else -record.value
    if isinstance(record, SingleAnswerRecord):
        return float(record.greedy)
    if record.benchmark == "lambada":
        return float(record.greedy[record.gold])
    values = list(record.log_likelihoods)
    if record.benchmark in LENGTH_NORMALIZED:
        values = _per_byte(record)
    return float(values.index(max(values)) == record.gold)


def margin(record: ChoiceRecord) -> float:
    """Return log-likelihood per byte, right answer minus best wrong one; 0 without wrong ones."""
    values = _per_byte(record)
    right = values.pop(record.gold)
    return right - max(values, default=right)


def accuracy_benchmarks(records: Records) -> Mapping[str, Sequence[AbilityRecord]]:
    """Return the benchmarks whose mean is the accuracy.

    They are those with right and wrong answers or, if there are none, the tasks with their own
    score. The two are not averaged: a task's own score may have any scale.
    """
    right_or_wrong: dict[str, list[AbilityRecord]]
    right_or_wrong = by_benchmark(records, ChoiceRecord, SingleAnswerRecord)
    return right_or_wrong or by_benchmark(records, ScoreRecord)


def metric_names(answers: Sequence[GenerationRecord]) -> list[str]:
    """Return the metrics of generated answers, also failed ones, in order of appearance."""
    names: dict[str, None] = {}
    for answer in answers:
        names |= dict.fromkeys([*answer.metrics, *answer.errors])
    return list(names)


def metric_values(answers: Sequence[GenerationRecord], name: str) -> list[float]:
    """Return a metric of each answer that has it.

    Args:
        answers: of one model.
        name: of a metric; an answer for which it failed lacks it.
    """
    values = []
    for answer in answers:
        if name in answer.metrics:
            values.append(answer.metrics[name])
    return values


def metric_errors(records: Records) -> tuple[str, ...]:
    """Return a message for each metric of an answer that could not be computed."""
    messages = []
    for answer in of_type(records, GenerationRecord):
        for name, message in answer.errors.items():
            messages.append(f"{name} of answer {answer.id}: {message}")
    return tuple(messages)


def _generation(
    answers: Sequence[GenerationRecord], metrics: Sequence[str]
) -> dict[str, float | None]:
    means: dict[str, float | None] = dict.fromkeys(metrics)
    for name in metric_names(answers):
        means[name] = _mean(metric_values(answers, name))
    return means


def _error_counts(answers: Sequence[GenerationRecord]) -> dict[str, int]:
    """Return metric → number of answers for which it failed, for the metrics that did."""
    counts = {}
    for name in metric_names(answers):
        failed = [answer for answer in answers if name in answer.errors]
        if failed:
            counts[name] = len(failed)
    return counts


def _benchmarks(records: Records) -> dict[str, BenchmarkScores]:
    every: dict[str, list[AbilityRecord]] = by_benchmark(records, *ABILITIES)
    choices = by_benchmark(records, ChoiceRecord)
    missing = left_out(records)
    results = {}
    for name in ability_benchmarks(records):
        rows = every.get(name, [])
        results[name] = BenchmarkScores(
            choice_probability=_mean_over_items(choices.get(name, []), choice_probability),
            accuracy=_mean_over_items(rows, accuracy),
            items=len(rows),
            left_out=missing.get(name, 0),
        )
    return results


def _corpus(answers: Sequence[GenerationRecord]) -> dict[str, float | None]:
    """Score all answers as one text; long ones weigh more.

    Sources: Papineni et al. 2002 (BLEU), Popović 2015 (chrF).
    """
    if not answers:
        return {"bleu": None, "chrf": None}
    generated = [answer.answer for answer in answers]
    references = [[answer.reference for answer in answers]]
    return {
        "bleu": float(BLEU(force=True).corpus_score(generated, references).score),
        "chrf": float(CHRF().corpus_score(generated, references).score),
    }


def _loss(records: Sequence[LossRecord]) -> float | None:
    """Return the loss per token or byte; None without records."""
    if not records:
        return None
    nll = sum(record.nll for record in records)
    return nll / sum(record.units for record in records)


def _mean_over_benchmarks(
    benchmarks: Mapping[str, Sequence[Ability]], metric: Callable[[Ability], float]
) -> float | None:
    """Return the mean of the benchmarks' means of one metric; None without benchmarks."""
    return _mean([_mean_over_items(rows, metric) for rows in benchmarks.values()])


def _mean_over_items(rows: Sequence[Ability], metric: Callable[[Ability], float]) -> float | None:
    return _mean([metric(row) for row in rows])


def _mean(values: Sequence[float | None]) -> float | None:
    if not values:
        return None
    return float(np.mean(np.array(values, dtype=np.float64)))


def _per_byte(record: ChoiceRecord) -> list[float]:
    pairs = zip(record.log_likelihoods, record.bytes, strict=True)
    return [value / size for value, size in pairs]
