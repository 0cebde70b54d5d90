"""A greedy answer consists of the likeliest tokens, up to its end or the maximum length."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipelines.comparison.record_types import GenerationRecord, LeftOutRecord
from pipelines.config.data_section import DataSection
from pipelines.data.preparation import tokenize
from pipelines.evaluation.generation import (
    ANSWERS,
    EXECUTION,
    GenerationConfig,
    answer_records,
    generate,
)
from pipelines.evaluation.metrics import load_metrics
from pipelines.models.checked import CheckedReader

PROMPTS = (
    "The quick brown fox",
    "Say",
    "def area(width, height): return",
    "Question: What does this function do? Answer:",
)
LENGTH = 12


def configured(**changes: Any) -> GenerationConfig:
    settings = {
        "max_new_tokens": LENGTH,
        "metrics": load_metrics(["chrf", "exact_match"], []),
        "argv": [],
        "seconds": 5,
        "context": None,
    }
    return GenerationConfig(**{**settings, **changes})


@torch.inference_mode()
def greedy(
    reference: PreTrainedModel, prompt: Sequence[int], length: int, end: int | None
) -> list[int]:
    """Take the likeliest token repeatedly, reading the complete text each time."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length and (end is None or end not in ids[len(prompt) :]):
        logits = reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def example(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = tokenizer("Say red 1. red red.").input_ids
    return {"input_ids": ids, "prompt_tokens": 6, "reference": "red red."}


def test_answers_are_those_of_each_prompt_alone(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    expected = []
    for prompt in prompts:
        tokens = greedy(reference, prompt, LENGTH, tokenizer.eos_token_id)
        expected.append(tokenizer.decode(tokens, skip_special_tokens=True))
    assert len(set(expected)) > 2
    answers = generate(CheckedReader(model), tokenizer, prompts, LENGTH)
    assert [answer.text for answer in answers] == expected


def test_a_truncated_answer_has_not_ended(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    [one] = generate(CheckedReader(model), tokenizer, [tokenizer(PROMPTS[0]).input_ids], LENGTH)
    assert not one.ended


def test_an_answer_ends_at_an_end_token(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = tokenizer(PROMPTS[0]).input_ids
    tokens = greedy(reference, prompt, LENGTH, None)
    new = [index for index in range(3, LENGTH) if tokens[index] not in tokens[:index]]
    end = new[0]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokens[end]])
    [one] = generate(CheckedReader(model), tokenizer, [prompt], LENGTH)
    assert one.ended
    assert one.text.startswith(tokenizer.decode(tokens[:end], skip_special_tokens=True))


def test_an_answer_ends_at_a_stop_sequence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    reader = CheckedReader(model)
    complete = [answer.text for answer in generate(reader, tokenizer, prompts, LENGTH)]
    end = complete[0][4:7]
    until = [end, "no text has this"]
    answers = generate(reader, tokenizer, prompts, LENGTH, until=until)
    assert [answer.text for answer in answers] == [text.partition(end)[0] for text in complete]
    assert [answer.ended for answer in answers] == [end in text for text in complete]


def test_generation_restores_the_attention_of_the_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = model.config._attn_implementation
    generate(CheckedReader(model), tokenizer, [tokenizer(PROMPTS[0]).input_ids], 2)
    assert model.config._attn_implementation == before
    assert generate(CheckedReader(model), tokenizer, [], 2) == []


def test_a_record_has_the_answer_and_its_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    [record] = answer_records(CheckedReader(model), tokenizer, [example], configured())
    assert isinstance(record, GenerationRecord)
    [answer] = generate(CheckedReader(model), tokenizer, [example["input_ids"][:6]], LENGTH)
    assert (record.kind, record.id) == ("generation", 0)
    assert (record.benchmark, record.reference) == (ANSWERS, "red red.")
    assert record.answer == answer.text.strip()
    assert set(record.metrics) == {"chrf", "exact_match"}
    assert (record.errors, record.ended) == ({}, False)
    assert len(record.prompt_sha256) == 64
    assert record.prompt == tokenizer.decode(example["input_ids"][:6]).strip()


def test_an_example_without_prompt_or_reference_is_not_answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    examples = [{**example, "prompt_tokens": 0}, {**example, "reference": ""}, example]
    records = answer_records(CheckedReader(model), tokenizer, examples, configured())
    assert [record.id for record in records] == [2]


def test_a_prompt_without_room_for_an_answer_is_left_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    longer = {**example, "prompt_tokens": 7}
    config = configured(context=6 + LENGTH, argv=["true"])
    records = list(answer_records(CheckedReader(model), tokenizer, [longer, example], config))
    assert [type(record) for record in records] == [LeftOutRecord, GenerationRecord]
    assert records[0].left_out == f"{7 + LENGTH} tokens exceed the context of {6 + LENGTH}"
    assert (records[0].prompt, records[0].reference) == ("Say red 1", "red red.")
    assert set(records[1].metrics) == {"chrf", "exact_match", EXECUTION}


def test_a_truncated_prompt_is_left_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    ids = example["input_ids"][:6]
    complete = {**example, "input_ids": ids, "prompt_tokens": 6}
    truncated = {**example, "input_ids": ids, "prompt_tokens": 7}
    reader = CheckedReader(model)
    kept, left = answer_records(reader, tokenizer, [complete, truncated], configured())
    [answer] = generate(reader, tokenizer, [ids], LENGTH)
    assert isinstance(kept, GenerationRecord)
    assert isinstance(left, LeftOutRecord)
    assert kept.answer == answer.text.strip()
    assert left.left_out == "its prompt of 7 tokens is truncated to data.max_tokens 6"
    assert left.id == 1


def test_a_conversation_truncated_in_its_last_question_is_not_answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    roles = ("user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": "red green blue"} for role in roles]
    rows = Dataset.from_list([{"messages": turns}])
    settings = DataSection(source="rows", max_tokens=10_000)
    [complete] = tokenize(rows, tokenizer, settings)
    shorter = settings.model_copy(update={"max_tokens": complete.prompt_tokens - 1})
    [truncated] = tokenize(rows, tokenizer, shorter)
    assert any(truncated.supervised)
    examples = [vars(truncated), vars(complete)]
    left, kept = answer_records(CheckedReader(model), tokenizer, examples, configured())
    assert (type(left), type(kept)) == (LeftOutRecord, GenerationRecord)


def test_a_command_scores_in_addition_to_the_metrics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    for argv, value in ((["true"], 100), (["false"], 0)):
        [record] = answer_records(CheckedReader(model), tokenizer, [example], configured(argv=argv))
        assert record.metrics[EXECUTION] == value


def test_a_command_that_fails_adds_an_error_to_the_metrics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    config = configured(argv=["sh", "-c", "echo broken >&2; exit 5"])
    [record] = answer_records(CheckedReader(model), tokenizer, [example], config)
    assert record.errors == {EXECUTION: "ended with status 5: broken"}
    assert set(record.metrics) == {"chrf", "exact_match"}
