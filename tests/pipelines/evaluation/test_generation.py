"""A greedy answer is the likeliest token after the other, up to its end; what has no end or no room is said to have none."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def judging(**changes: Any) -> GenerationConfig:
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
    """Take the likeliest token again and again, reading everything anew."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length and (end is None or end not in ids[len(prompt) :]):
        ids.append(
            int(reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        )
    return ids[len(prompt) :]


@pytest.fixture
def example(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = tokenizer("Say red 1. red red.").input_ids
    return {"input_ids": ids, "prompt_tokens": 6, "reference": "red red."}


def test_answers_are_those_of_each_prompt_alone(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    expected = [
        tokenizer.decode(
            greedy(reference, prompt, LENGTH, tokenizer.eos_token_id), skip_special_tokens=True
        )
        for prompt in prompts
    ]
    assert len(set(expected)) > 2
    assert [
        one.text for one in generate(CheckedReader(model), tokenizer, prompts, LENGTH)
    ] == expected


def test_an_answer_that_is_cut_has_not_ended(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    [one] = generate(CheckedReader(model), tokenizer, [tokenizer(PROMPTS[0]).input_ids], LENGTH)
    assert not one.ended


def test_an_answer_ends_at_an_end_mark(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = tokenizer(PROMPTS[0]).input_ids
    tokens = greedy(reference, prompt, LENGTH, None)
    place = next(place for place in range(3, LENGTH) if tokens[place] not in tokens[:place])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokens[place]])
    [one] = generate(CheckedReader(model), tokenizer, [prompt], LENGTH)
    assert one.ended
    assert one.text.startswith(tokenizer.decode(tokens[:place], skip_special_tokens=True))


def test_an_answer_ends_where_a_text_says_so(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    whole = [one.text for one in generate(CheckedReader(model), tokenizer, prompts, LENGTH)]
    end = whole[0][4:7]
    cut = generate(
        CheckedReader(model), tokenizer, prompts, LENGTH, until=[end, "no text has this"]
    )
    assert [one.text for one in cut] == [text.partition(end)[0] for text in whole]
    assert [one.ended for one in cut] == [end in text for text in whole]


def test_the_models_attention_is_what_it_was(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = model.config._attn_implementation
    generate(CheckedReader(model), tokenizer, [tokenizer(PROMPTS[0]).input_ids], 2)
    assert model.config._attn_implementation == before
    assert generate(CheckedReader(model), tokenizer, [], 2) == []


def test_a_record_holds_the_answer_and_its_figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    [record] = answer_records(CheckedReader(model), tokenizer, [example], judging())
    [answer] = generate(CheckedReader(model), tokenizer, [example["input_ids"][:6]], LENGTH)
    assert (record["kind"], record["id"], record["benchmark"], record["reference"]) == (
        "generation",
        0,
        ANSWERS,
        "red red.",
    )
    assert record["answer"] == answer.text.strip()
    assert set(record["metrics"]) == {"chrf", "exact_match"}
    assert (record["errors"], record["ended"]) == ({}, False)
    assert len(record["prompt_sha256"]) == 64
    asked = {"kind", "id", "benchmark", "prompt", "prompt_sha256", "reference"}
    assert set(record) == {*asked, "answer", "ended", "metrics", "errors"}


def test_what_has_no_prompt_or_no_reference_is_not_answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    examples = [{**example, "prompt_tokens": 0}, {**example, "reference": ""}, example]
    assert [
        record["id"]
        for record in answer_records(CheckedReader(model), tokenizer, examples, judging())
    ] == [2]


def test_a_prompt_without_room_for_an_answer_is_left_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    longer = {**example, "prompt_tokens": 7}
    records = list(
        answer_records(
            CheckedReader(model),
            tokenizer,
            [longer, example],
            judging(context=6 + LENGTH, argv=["true"]),
        )
    )
    assert records[0]["left_out"] == f"{7 + LENGTH} tokens exceed the context of {6 + LENGTH}"
    assert set(records[0]) == {
        "kind",
        "id",
        "benchmark",
        "prompt",
        "prompt_sha256",
        "reference",
        "left_out",
    }
    assert set(records[1]["metrics"]) == {"chrf", "exact_match", EXECUTION}


def test_a_prompt_that_is_cut_is_left_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    whole, half = {**example, "prompt_tokens": 6}, {**example, "prompt_tokens": 7}
    cut = {"input_ids": example["input_ids"][:6]}
    kept, left = answer_records(
        CheckedReader(model), tokenizer, [whole | cut, half | cut], judging()
    )
    assert (
        "left_out" not in kept
        and kept["answer"]
        == generate(CheckedReader(model), tokenizer, [example["input_ids"][:6]], LENGTH)[
            0
        ].text.strip()
    )
    assert left["left_out"] == "its prompt of 7 tokens is cut to data.max_tokens 6"
    assert (left["id"], "answer" in left) == (1, False)


def test_a_conversation_that_is_cut_inside_its_last_question_is_not_answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    turns = [
        {"role": role, "content": "red green blue"}
        for role in ("user", "assistant", "user", "assistant")
    ]
    settings = {"source": "rows", "group_column": None, "max_tokens": 10_000}
    [whole] = tokenize(Dataset.from_list([{"messages": turns}]), tokenizer, settings)
    [cut] = tokenize(
        Dataset.from_list([{"messages": turns}]),
        tokenizer,
        {**settings, "max_tokens": whole.prompt_tokens - 1},
    )
    assert any(cut.supervised)
    left, kept = answer_records(
        CheckedReader(model), tokenizer, [vars(cut), vars(whole)], judging()
    )
    assert ("left_out" in left, "left_out" in kept) == (True, False)


def test_a_command_judges_beside_the_metrics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    for argv, value in ((["true"], 100), (["false"], 0)):
        [record] = answer_records(CheckedReader(model), tokenizer, [example], judging(argv=argv))
        assert record["metrics"][EXECUTION] == value


def test_a_command_that_fails_is_an_error_beside_the_metrics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> None:
    [record] = answer_records(
        CheckedReader(model),
        tokenizer,
        [example],
        judging(argv=["sh", "-c", "echo broken >&2; exit 5"]),
    )
    assert record["errors"] == {EXECUTION: "ended with status 5: broken"}
    assert set(record["metrics"]) == {"chrf", "exact_match"}
