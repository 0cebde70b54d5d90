"""Turn items into token trees and, once a model is scored, into records.

Items are tokenized once for all models of a comparison.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipelines.comparison.record_types import (
    ChoiceRecord,
    ItemRecord,
    LeftOutRecord,
    PassageRecord,
    SingleAnswerRecord,
)
from pipelines.errors import DataError
from pipelines.evaluation.items import Item
from pipelines.evaluation.scoring import Score
from pipelines.evaluation.trees import Tree, build_prefix_tree, encode


@dataclass(frozen=True)
class Question:
    """An item as tokens."""

    item: Item
    tree: Tree
    left_out: str | None
    """Why the item is not evaluated; None if it is."""
    bytes: int
    """Length of the scored text of the right answer."""


def tokenize(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, context: int | None
) -> list[Question]:
    """Turn items into trees.

    Args:
        items: of any kinds.
        tokenizer: the base's.
        context: the model's context length in tokens; None if unknown.

    Raises:
        DataError: an item has nothing to read or nothing to score.
    """
    plain = list[str]()
    chats = list[str]()
    for item in items:
        texts = chats if item.kind == "chat" else plain
        for before, whole in _texts(item):
            texts += [before, whole]
    plain_tokens = encode(plain, tokenizer)
    chat_tokens = encode(chats, tokenizer, special=False)
    found = []
    for item in items:
        tokens = chat_tokens if item.kind == "chat" else plain_tokens
        found.append(_question(item, tokens, context, tokenizer))
    return found


def records(questions: Sequence[Question], scores: Iterator[list[Score]]) -> Iterator[ItemRecord]:
    """Yield each question's record.

    Args:
        questions: all of them.
        scores: of the questions that are evaluated, in their order.
    """
    for question in questions:
        if question.left_out is not None:
            yield left_out_record(question.item, question.left_out)
        else:
            yield _record(question, next(scores))


def choice_record(
    item: Item, log_likelihoods: Sequence[float], greedy: Sequence[bool]
) -> ChoiceRecord:
    """Return the record of a multiple-choice question.

    Args:
        item: the question.
        log_likelihoods: of each choice, in nats.
        greedy: whether each choice is the likeliest of all texts.
    """
    return ChoiceRecord(
        id=item.id,
        benchmark=item.benchmark,
        prompt_sha256=item.prompt_sha256,
        gold=item.gold,
        log_likelihoods=tuple(round(value, 6) for value in log_likelihoods),
        bytes=tuple(len(choice.scored.encode()) for choice in item.choices),
        greedy=tuple(greedy),
    )


def left_out_record(item: Item, reason: str) -> LeftOutRecord:
    """Return the record of an item that is not evaluated.

    Args:
        item: of any kind.
        reason: for the report, such as "1,200 tokens exceed the context of 1,024".
    """
    return LeftOutRecord(
        kind=item.kind,
        id=item.id,
        benchmark=item.benchmark,
        prompt_sha256=item.prompt_sha256,
        left_out=reason,
    )


def too_long(tokens: int, context: int | None) -> str | None:
    """Return why so many tokens are left out, or None if they fit into the context.

    Args:
        tokens: that the model would have to read.
        context: the model's context length in tokens; None if unknown, and then nothing is too
            long.
    """
    if context is None or tokens <= context:
        return None
    return f"{tokens:,} tokens exceed the context of {context:,}"


def _texts(item: Item) -> list[tuple[str, str]]:
    """Return, for each answer, the text that is read before it and the complete text."""
    found = []
    for choice in item.choices:
        before = item.context + choice.lead
        found.append((before, before + choice.scored))
    return found


def _question(
    item: Item,
    tokens: dict[str, list[int]],
    context: int | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Question:
    is_text = item.kind == "text"
    wholes = []
    starts = []
    for before, whole in _texts(item):
        start = len(tokens[before])
        if is_text:
            start = 1  # text is scored after its first token
        wholes.append(tokens[whole])
        starts.append(start)
    tree = build_prefix_tree(wholes, starts)
    if tree is None:
        raise DataError(f"{item.id} has an empty context or answer; leave it out")
    scored_bytes = len(item.choices[item.gold].scored.encode())
    if is_text:
        first_token = wholes[0][:1]
        unscored = str(tokenizer.decode(first_token, skip_special_tokens=True))
        scored_bytes -= len(unscored.encode())
    left_out = too_long(tree.context, context)
    return Question(item, tree, left_out, scored_bytes)


def _record(question: Question, scores: list[Score]) -> ItemRecord:
    """Return the record of a question from the score of each of its answers."""
    item = question.item
    if item.kind == "general":
        likelihoods = [score.log_likelihood for score in scores]
        greedy = [score.greedy for score in scores]
        return choice_record(item, likelihoods, greedy)
    [score] = scores
    if item.kind == "text":
        return PassageRecord(
            id=item.id,
            benchmark=item.benchmark,
            prompt_sha256=item.prompt_sha256,
            nll=-score.log_likelihood,
            tokens=score.tokens,
            bytes=question.bytes,
        )
    assert item.kind == "answer", "chats and documents of lm-eval are scored elsewhere"
    return SingleAnswerRecord(
        id=item.id,
        benchmark=item.benchmark,
        prompt_sha256=item.prompt_sha256,
        nll=-score.log_likelihood,
        tokens=score.tokens,
        bytes=question.bytes,
        greedy=score.greedy,
    )
