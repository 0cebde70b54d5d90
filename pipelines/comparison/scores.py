"""One model's figures, from its item records.

    task loss             what was learnt: nats per supervised token of the held-out examples
    choice probability    what was forgotten: p(right) / Σ p(choice), for questions with choices
    accuracy              the same, coarser: whether the right answer is the likeliest
    margin                the same, per byte: log-likelihood of the right answer over the best wrong one's
    text loss, chat loss  what a change of style does: plain passages, and right answers put as chats

A likelihood by itself shows no forgetting: the base is an instruct model, and any training on plain text makes plain text
likelier, right and wrong answers alike; so text and chat loss are shown and never judged. Accuracy moves only where an
order flips, so that some hundred items cannot show it (Schaeffer et al. 2024, arXiv 2406.04391, on which scores move
smoothly).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from pipelines.comparison.records import ABILITIES, Record, Records, by_benchmark, left_out, scored

LENGTH_NORMALISED = ("hellaswag", "piqa", "arc_easy", "openbookqa")
"""Benchmarks whose accuracy divides by the answer's bytes; the others compare answers of one or two tokens, or the same text."""


@dataclass(frozen=True)
class Benchmark:
    """One model's figures on one benchmark."""

    choice_probability: float | None
    """None where its questions have no choices."""
    accuracy: float | None
    """Share of right answers; for a task that rates itself, its mean score, negative where lower is better; None without items."""
    items: int
    left_out: int


@dataclass(frozen=True)
class Scores:
    """One model's figures; what was not asked is None."""

    task_loss: float
    """Nats per supervised token of the held-out examples."""
    perplexity: float
    """e to the task loss."""
    generation: dict[str, float | None]
    """Metric → its mean over the answers that have it."""
    corpus: dict[str, float | None]
    """bleu and chrf of all answers as one text, of 100."""
    unfinished_answers: int
    """Answers that stopped only because they reached the longest length."""
    choice_probability: float | None
    """Mean p(right) / Σ p(choice); the mean of the benchmarks' means."""
    accuracy: float | None
    """Share of right answers; the mean of the benchmarks' shares."""
    margin: float | None
    """Log-likelihood per byte of the right answer over the best wrong one."""
    text_loss: float | None
    """Nats per byte of plain text."""
    chat_loss: float | None
    """Nats per token of right answers, put as chats."""
    benchmarks: dict[str, Benchmark]
    errors: dict[str, int]
    """Metric → answers for which it could not be computed."""


def scores(records: Records, metrics: Sequence[str] = ()) -> Scores:
    """Summarise one model's item records.

    Args:
        records: in the order of evaluation.
        metrics: names of the metrics that were asked for; where nothing was generated they are None.
    """
    answers, choices = scored(records, "generation"), by_benchmark(records, "general")
    loss = _loss_per(scored(records, "task"), "tokens")
    assert loss is not None, "evaluation scores held-out examples"
    return Scores(
        task_loss=loss,
        perplexity=exp(loss),
        generation={
            **dict.fromkeys(metrics),
            **{name: _mean(metric_values(answers, name)) for name in metric_names(answers)},
        },
        corpus=_corpus(answers),
        unfinished_answers=sum(not answer["ended"] for answer in answers),
        choice_probability=_mean(
            [_mean([choice_probability(one) for one in rows]) for rows in choices.values()]
        ),
        accuracy=_mean(
            [_mean([accuracy(one) for one in rows]) for rows in right_or_wrong(records).values()]
        ),
        margin=_mean([_mean([margin(one) for one in rows]) for rows in choices.values()]),
        text_loss=_loss_per(scored(records, "text"), "bytes"),
        chat_loss=_loss_per(scored(records, "chat"), "tokens"),
        benchmarks=_benchmarks(records),
        errors={
            name: count
            for name in metric_names(answers)
            if (count := sum(name in answer["errors"] for answer in answers))
        },
    )


def choice_probability(record: Record) -> float:
    """Return p(right) / Σ p(choice)."""
    values = record["log_likelihoods"]
    highest = max(values)
    return exp(values[record["gold"]] - highest) / sum(exp(value - highest) for value in values)


def accuracy(record: Record) -> float:
    """Return 1 where the answer is right and 0 where it is wrong; where a task rates itself its value, negative if lower is better.

    An answer is right where it is the likeliest of its choices: per byte, or as is; in LAMBADA, and where there are no
    choices, the likeliest of all.
    """
    if record["kind"] == "score":
        return float(record["value"] if record["higher_is_better"] else -record["value"])
    if record["kind"] == "answer":
        return float(record["greedy"])
    if record["benchmark"] == "lambada":
        return float(record["greedy"][record["gold"]])
    values = (
        _per_byte(record) if record["benchmark"] in LENGTH_NORMALISED else record["log_likelihoods"]
    )
    return float(values.index(max(values)) == record["gold"])


def margin(record: Record) -> float:
    """Return by how much the right answer's log-likelihood per byte exceeds the best wrong one's; 0 where it stands alone."""
    values = _per_byte(record)
    right = values.pop(record["gold"])
    return right - max(values, default=right)


def right_or_wrong(records: Records) -> dict[str, list[Record]]:
    """Return the benchmarks whose answers are right or wrong, or if there are none those that rate themselves.

    The two are not averaged: a task's own score may have any scale.
    """
    return by_benchmark(records, "general", "answer") or by_benchmark(records, "score")


def metric_names(answers: Records) -> list[str]:
    """Return the metrics of some generated answers, those that failed as well, in the order of their first appearance."""
    return list(
        dict.fromkeys(
            name for answer in answers for name in (*answer["metrics"], *answer["errors"])
        )
    )


def metric_values(answers: Records, name: str) -> list[float]:
    """Return a metric of each answer that has it."""
    return [float(answer["metrics"][name]) for answer in answers if name in answer["metrics"]]


def metric_errors(records: Records) -> tuple[str, ...]:
    """Return which metric could not be computed of which answer, and why."""
    answers = scored(records, "generation")
    return tuple(
        f"{name} of answer {answer['id']}: {message}"
        for answer in answers
        for name, message in answer["errors"].items()
    )


def _benchmarks(records: Records) -> dict[str, Benchmark]:
    every, choices, missing = (
        by_benchmark(records, *ABILITIES),
        by_benchmark(records, "general"),
        left_out(records),
    )
    names = dict.fromkeys(record["benchmark"] for record in records if record["kind"] in ABILITIES)
    return {
        name: Benchmark(
            choice_probability=_mean([choice_probability(one) for one in choices.get(name, [])]),
            accuracy=_mean([accuracy(one) for one in every.get(name, [])]),
            items=len(every.get(name, [])),
            left_out=missing.get(name, 0),
        )
        for name in names
    }


def _corpus(answers: Records) -> dict[str, float | None]:
    """Rate all answers at once, which weighs long ones more (Papineni et al. 2002; Popović 2015)."""
    if not answers:
        return {"bleu": None, "chrf": None}
    said, wanted = (
        [answer["answer"] for answer in answers],
        [[answer["reference"] for answer in answers]],
    )
    return {
        "bleu": float(BLEU(force=True).corpus_score(said, wanted).score),
        "chrf": float(CHRF().corpus_score(said, wanted).score),
    }


def _loss_per(records: Records, unit: str) -> float | None:
    return (
        float(sum(record["nll"] for record in records) / sum(record[unit] for record in records))
        if records
        else None
    )


def _mean(values: Sequence[float | None]) -> float | None:
    return float(np.mean(np.array(values, dtype=np.float64))) if values else None


def _per_byte(record: Record) -> list[float]:
    return [
        value / size for value, size in zip(record["log_likelihoods"], record["bytes"], strict=True)
    ]
