"""Greedy answers to held-out prompts, and their scores compared with the references."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pipelines.evaluation.execution import Verdict, execute
from pipelines.evaluation.metrics import Metric, measure
from pipelines.evaluation.questions import Record, too_long
from pipelines.models.checked import CheckedReader, padded
from pipelines.models.forward import attending_by
from pipelines.runtime.stage import digest

BATCH = 24
EXECUTION = "execution"
"""Name of the score that the recipe's command gives."""
ANSWERS = "answers"
"""Benchmark name of the records of answers."""


@dataclass(frozen=True)
class Answer:
    """What a model generated."""

    text: str
    ended: bool
    """Whether it ended by itself, before the maximum number of tokens."""


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are generated and scored; the same for every model."""

    max_new_tokens: int
    metrics: Mapping[str, Metric]
    argv: Sequence[str]
    """Command that scores an answer; empty for none."""
    seconds: float
    """Its maximum duration."""
    context: int | None
    """The model's context length in tokens; None if unknown."""


def answer_records(
    reader: CheckedReader,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    config: GenerationConfig,
) -> Iterator[Record]:
    """Yield, for each example with a prompt, the greedy answer and its scores.

    If the prompt is not answered, the record has the reason.
    """
    prompts = list[list[int]]()
    records = list[Record]()
    for index, example in enumerate(examples):
        if example["prompt_tokens"] > 0 and example["reference"]:
            prompt = example["input_ids"][: example["prompt_tokens"]]
            record = _head(index, prompt, example["reference"], tokenizer)
            reason = _reason_to_leave_out(example, config)
            if reason is None:
                prompts.append(prompt)
            else:
                record["left_out"] = reason
            records.append(record)
    answers = generate(reader, tokenizer, prompts, config.max_new_tokens)
    answered = [record for record in records if "left_out" not in record]
    for record, answer in zip(answered, answers, strict=True):
        record["answer"] = answer.text.strip()
    for record, scores, answer in zip(answered, _scores(answered, config), answers, strict=True):
        record |= {**scores, "ended": answer.ended}
    yield from records


@torch.inference_mode()
def generate(
    reader: CheckedReader,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    until: Sequence[str] = (),
) -> list[Answer]:
    """Answer token prompts greedily.

    Prompts of similar length form a batch, if the model answers a batch like each prompt alone.

    Args:
        reader: of the model.
        tokenizer: the base's; its end-of-text token ends an answer, and so do those in the model's
            generation settings.
        prompts: tokens of each prompt.
        max_new_tokens: maximum length of an answer.
        until: texts that end an answer as well; the answer is cut off before them.
    """
    if not prompts:
        return []
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    method = reader.generation(prompts)
    size = BATCH if method.batched else 1
    with attending_by(reader.model, method.attention):
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            batch = [prompts[index] for index in indices]
            found = _answer_batch(reader.model, tokenizer, batch, max_new_tokens, until)
            answers |= zip(indices, found, strict=True)
    return [answers[index] for index in range(len(prompts))]


def _answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    until: Sequence[str],
) -> list[Answer]:
    """Answer one batch, padded on the left."""
    width = len(max(prompts, key=len))
    ends = _end_tokens(model, tokenizer)
    filler = tokenizer.pad_token_id
    if filler is None:
        filler = ends[0] if ends else 0
    ids, mask = padded(prompts, filler=filler, device=str(model.device))
    criteria = [_Until(tokenizer, width, until)] if until else []
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=filler,
        eos_token_id=ends or None,
        stopping_criteria=StoppingCriteriaList(criteria),
    )
    generated = output[:, width:].tolist()
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    answers = []
    for text, tokens in zip(texts, generated, strict=True):
        has_end_token = not set(ends).isdisjoint(tokens)
        answers.append(_answer(text, has_end_token, until))
    return answers


class _Until(StoppingCriteria):
    """Ends an answer that contains one of several texts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, width: int, until: Sequence[str]
    ) -> None:
        self.tokenizer = tokenizer
        self.width = width
        self.until = until

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        ended = [_stop_position(text, self.until) is not None for text in texts]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]


def _answer(text: str, ended: bool, until: Sequence[str]) -> Answer:
    position = _stop_position(text, until)
    if position is None:
        return Answer(text, ended)
    return Answer(text[:position], ended=True)


def _stop_position(text: str, until: Sequence[str]) -> int | None:
    """Return where the first of several texts begins; None if there is none."""
    positions = [text.index(end) for end in until if end in text]
    return min(positions, default=None)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer.

    They are the tokenizer's, which training teaches, and the model's own.
    """
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(int(token) for token in named if token is not None))


def _reason_to_leave_out(example: Mapping[str, Any], config: GenerationConfig) -> str | None:
    """Return why a prompt is not answered; None if it is.

    A truncated question has another answer than the complete one.
    """
    prompt_tokens = example["prompt_tokens"]
    kept = len(example["input_ids"])
    if prompt_tokens > kept:
        return f"its prompt of {prompt_tokens:,} tokens is truncated to data.max_tokens {kept:,}"
    return too_long(prompt_tokens + config.max_new_tokens, config.context)


def _head(
    index: int, prompt: list[int], reference: str, tokenizer: PreTrainedTokenizerBase
) -> Record:
    return {
        "kind": "generation",
        "id": index,
        "benchmark": ANSWERS,
        "prompt": str(tokenizer.decode(prompt, skip_special_tokens=True)).strip(),
        "prompt_sha256": digest([str(tokenizer.decode(prompt)), reference]),
        "reference": reference,
    }


def _scores(records: Sequence[Record], config: GenerationConfig) -> Iterator[Record]:
    """Yield the metrics and errors of each answer."""
    inputs = [
        {
            "prompt": record["prompt"],
            "answer": record["answer"],
            "reference": record["reference"],
        }
        for record in records
    ]
    verdicts: Sequence[Verdict | None] = [None] * len(records)
    if config.argv:
        verdicts = execute(config.argv, inputs, config.seconds)
    for one, verdict in zip(inputs, verdicts, strict=True):
        values, errors = measure(
            config.metrics,
            one["answer"],
            one["reference"],
            one["prompt"],
        )
        if isinstance(verdict, str):
            errors[EXECUTION] = verdict
        elif verdict is not None:
            values[EXECUTION] = verdict
        yield {"metrics": values, "errors": errors}
