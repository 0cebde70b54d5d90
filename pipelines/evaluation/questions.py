"""From items to token trees and, once a model has answered, to records. Tokenised once for all models of a comparison."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipelines.errors import DataError
from pipelines.evaluation.items import Choice, Item
from pipelines.evaluation.scoring import Score
from pipelines.evaluation.trees import Tree, build_prefix_tree, encode
from pipelines.runtime.stage import digest

Record = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """An item as tokens."""

    item: Item
    tree: Tree
    left_out: str | None
    """Why the item is not asked; None where it is."""
    bytes: int
    """Length of what is scored of the right answer."""


def tokenize(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, context: int | None
) -> list[Question]:
    """Turn items into trees.

    Args:
        items: of any kinds.
        tokenizer: the base's.
        context: how many tokens the model takes; None where it does not say.

    Raises:
        DataError: an item has nothing to read or nothing to score.
    """
    texts: dict[bool, list[str]] = {item.kind == "chat": [] for item in items}
    for item in items:
        texts[item.kind == "chat"] += [text for pair in _pairs(item) for text in pair]
    tokens = {
        is_chat: encode(some, tokenizer, special=not is_chat) for is_chat, some in texts.items()
    }
    return [_question(item, tokens[item.kind == "chat"], context, tokenizer) for item in items]


def records(questions: Sequence[Question], scores: Iterator[list[Score]]) -> Iterator[Record]:
    """Yield each question's record; `scores` are those of the questions that are asked, in their order."""
    for question in questions:
        yield (
            left_out(question)
            if question.left_out is not None
            else {**head(question.item), **_values(question, next(scores))}
        )


def head(item: Item) -> Record:
    """Return what an item's record says whatever a model answers."""
    answers = [choice.lead + choice.scored for choice in item.choices]
    return {
        "kind": item.kind,
        "id": item.id,
        "benchmark": item.benchmark,
        "prompt_sha256": digest([item.context, *answers]),
    }


def general_values(
    gold: int, log_likelihoods: Sequence[float], greedy: Sequence[bool], choices: Sequence[Choice]
) -> Record:
    """Return what the record of a question with several answers says of a model's."""
    return {
        "gold": gold,
        "log_likelihoods": [round(value, 6) for value in log_likelihoods],
        "bytes": [len(choice.scored.encode()) for choice in choices],
        "greedy": list(greedy),
    }


def left_out(question: Question) -> Record:
    """Return the record of a question that is not asked."""
    return {**head(question.item), "left_out": question.left_out}


def too_long(tokens: int, context: int | None) -> str | None:
    """Return why so many tokens are left out, or None where the model takes them."""
    return (
        f"{tokens:,} tokens exceed the context of {context:,}"
        if context is not None and tokens > context
        else None
    )


def _pairs(item: Item) -> list[tuple[str, str]]:
    """Return, for each answer, what is read before it and the whole text."""
    read = [item.context + choice.lead for choice in item.choices]
    return [
        (before, before + choice.scored) for before, choice in zip(read, item.choices, strict=True)
    ]


def _question(
    item: Item,
    tokens: dict[str, list[int]],
    context: int | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Question:
    pairs = [(tokens[before], tokens[whole]) for before, whole in _pairs(item)]
    starts = [
        1 if item.kind == "text" else len(before) for before, _ in pairs
    ]  # a passage is scored after its first token
    tree = build_prefix_tree([whole for _, whole in pairs], starts)
    if tree is None:
        raise DataError(f"{item.id} has an empty context or answer; leave it out")
    unscored = (
        str(tokenizer.decode(pairs[0][1][:1], skip_special_tokens=True))
        if item.kind == "text"
        else ""
    )
    return Question(
        item,
        tree,
        too_long(tree.context, context),
        len(item.choices[item.gold].scored.encode()) - len(unscored.encode()),
    )


def _values(question: Question, scores: list[Score]) -> Record:
    if question.item.kind == "general":
        likelihoods, greedy = (
            [score.log_likelihood for score in scores],
            [score.greedy for score in scores],
        )
        return general_values(question.item.gold, likelihoods, greedy, question.item.choices)
    [score] = scores
    values: Record = {"nll": -score.log_likelihood, "tokens": score.tokens}
    if question.item.kind == "chat":
        return values
    values["bytes"] = question.bytes
    return values if question.item.kind == "text" else {**values, "greedy": score.greedy}
