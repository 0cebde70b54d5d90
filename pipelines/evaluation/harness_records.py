"""Turn what lm-eval keeps of a document into a record."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.comparison.record_types import ChoiceRecord, LeftOutRecord, ScoreRecord
from pipelines.errors import RecipeError
from pipelines.evaluation.documents import gold_index, scored_by_choice
from pipelines.evaluation.items import Choice, Item
from pipelines.evaluation.questions import choice_record, left_out_record

MEASURED_IN_BITS = "bits_per_byte"
DocumentRecord = ChoiceRecord | ScoreRecord | LeftOutRecord


def document_record(
    name: str, task: Any, sample: Mapping[str, Any], reason: str | None
) -> DocumentRecord:
    """Return the record of a document.

    Args:
        name: of the task.
        task: as lm-eval loads it.
        sample: what lm-eval keeps of the document.
        reason: why the document is left out; None if it is evaluated.

    Raises:
        RecipeError: the task computes none of its metrics for the document.
    """
    gold = None
    if scored_by_choice(task):
        gold = gold_index(task, sample["doc"])
    item = _item(name, sample, gold)
    if reason is not None:
        return left_out_record(item, reason)
    if gold is None:
        return _score_record(item, task, sample)
    likelihoods = []
    greedy = []
    for likelihood, is_greedy in _responses(item, sample):
        likelihoods.append(likelihood)
        greedy.append(is_greedy)
    return choice_record(item, likelihoods, greedy)


def _item(name: str, sample: Mapping[str, Any], gold: int | None) -> Item:
    """Return the item of a document.

    A mutual-information metric scores each answer without its context as well; those are left out.
    """
    choices = list[Choice]()
    for arguments in sample["arguments"]:
        context, *answer = map(str, arguments[:2])
        choices.append(Choice(lead=context, scored="".join(answer)))
    with_context = [choice for choice in choices if choice.lead]
    return Item(
        benchmark=name,
        id=f"{name}/{sample['doc_id']}",
        context="",
        choices=tuple(with_context or choices),
        gold=gold or 0,
        kind="score" if gold is None else "general",
    )


def _responses(item: Item, sample: Mapping[str, Any]) -> list[Any]:
    """Return the model's response to each answer of an item."""
    answered = sample["resps"][: len(item.choices)]
    return [responses[0] for responses in answered]


def _score_record(item: Item, task: Any, sample: Mapping[str, Any]) -> ScoreRecord | LeftOutRecord:
    """Return the record of a document's value by one metric, with the likelihoods behind it."""
    metric = _metric(item, task, sample["metrics"])
    aggregate = task.aggregation().get(metric)
    value = sample[metric]
    if aggregate is not None:
        value = aggregate([value])
    if not isinstance(value, int | float) or not math.isfinite(value):
        reason = f"its {metric} is {value!r}, which is not a finite number"
        return left_out_record(item, reason)
    log_likelihoods, greedy = _likelihoods(item, sample)
    return ScoreRecord(
        id=item.id,
        benchmark=item.benchmark,
        prompt_sha256=item.prompt_sha256,
        metric=metric,
        value=float(value),
        higher_is_better=bool(task.higher_is_better().get(metric, True)),
        log_likelihoods=log_likelihoods,
        greedy=greedy,
    )


def _likelihoods(
    item: Item, sample: Mapping[str, Any]
) -> tuple[tuple[float, ...] | None, tuple[bool, ...] | None]:
    """Return each answer's log-likelihood and whether it is greedy.

    A text as a unit has only the first; a generated answer has neither.
    """
    responses = _responses(item, sample)
    if all(isinstance(response, float) for response in responses):
        return tuple(round(response, 6) for response in responses), None
    if all(isinstance(response, tuple) for response in responses):
        log_likelihoods = tuple(round(value, 6) for value, _ in responses)
        greedy = tuple(is_greedy for _, is_greedy in responses)
        return log_likelihoods, greedy
    return None, None


def _metric(item: Item, task: Any, metrics: Sequence[str]) -> str:
    """Choose the metric of a document: one that is averaged, else bits per byte, else the first."""
    if not metrics:
        raise RecipeError(
            f"the lm-eval task {item.benchmark!r} computes none of its metrics for {item.id}; "
            "fix its metric_list"
        )
    aggregations = task.aggregation()
    for name in metrics:
        if getattr(aggregations.get(name), "__name__", "") == "mean":
            return name
    return MEASURED_IN_BITS if MEASURED_IN_BITS in metrics else metrics[0]
