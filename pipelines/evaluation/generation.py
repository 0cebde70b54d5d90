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

from pipelines.comparison.record_types import GenerationRecord, LeftOutRecord
from pipelines.evaluation.execution import Verdict, execute
from pipelines.evaluation.metrics import Metric, measure
from pipelines.evaluation.questions import too_long
from pipelines.models.checked import CheckedReader, padded
from pipelines.models.forward import attending_by
from pipelines.runtime.stage import digest

BATCH = 24
EXECUTION = "execution"
"""Name of the score that the recipe's command gives."""
ANSWERS = "answers"
"""Benchmark name of the records of answers."""


@dataclass(frozen=True)
class _HeldOutExample:
    """What a prepared example has of a prompt and its answer."""

    ids: list[int]
    """Of prompt and answer; truncated if the row is too long."""
    prompt_tokens: int
    """Of the complete prompt; 0 without one."""
    reference: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "_HeldOutExample":
        return cls(row["input_ids"], row["prompt_tokens"], row["reference"])

    @property
    def has_prompt(self) -> bool:
        return self.prompt_tokens > 0 and bool(self.reference)


@dataclass(frozen=True)
class HeldOutPrompt:
    """The prompt of a held-out example, and what its answer is compared with."""

    index: int
    """Of the example."""
    tokens: list[int]
    text: str
    prompt_sha256: str
    """Digest of the prompt and its reference."""
    reference: str
    """The answer in the data."""
    left_out: str | None
    """Why it is not answered; None if it is."""


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
    end_tokens: tuple[int, ...] = ()
    """Tokens that end an answer in the training data."""


def answer_records(
    reader: CheckedReader,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    config: GenerationConfig,
) -> Iterator[GenerationRecord | LeftOutRecord]:
    """Yield, for each example with a prompt, the greedy answer and its scores.

    If the prompt is not answered, the record has the reason.

    Args:
        reader: of the model.
        tokenizer: the base's.
        examples: rows of the prepared data, with their columns.
        config: how answers are generated and scored.
    """
    prompts = []
    for index, row in enumerate(examples):
        example = _HeldOutExample.of(row)
        if example.has_prompt:
            prompts.append(_prompt(index, example, tokenizer, config))
    answered = [prompt for prompt in prompts if prompt.left_out is None]
    tokens = [prompt.tokens for prompt in answered]
    answers = generate(
        reader, tokenizer, tokens, config.max_new_tokens, end_tokens=config.end_tokens
    )
    records = iter(_scored(answered, answers, config))
    for prompt in prompts:
        if prompt.left_out is None:
            yield next(records)
        else:
            yield _left_out(prompt, prompt.left_out)


@torch.inference_mode()
def generate(
    reader: CheckedReader,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    until: Sequence[str] = (),
    *,
    end_tokens: Sequence[int] = (),
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
        end_tokens: tokens that end an answer as well.
    """
    if not prompts:
        return []
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    method = reader.generation(prompts)
    ends = all_end_tokens(reader.model, tokenizer, end_tokens)
    ending = _Ending(ends, tuple(until))
    size = BATCH if method.batched else 1
    with attending_by(reader.model, method.attention):
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            batch = [prompts[index] for index in indices]
            found = _answer_batch(reader.model, tokenizer, batch, max_new_tokens, ending)
            answers |= zip(indices, found, strict=True)
    return [answers[index] for index in range(len(prompts))]


def _answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    ending: "_Ending",
) -> list[Answer]:
    """Answer one batch, padded on the left."""
    width = len(max(prompts, key=len))
    ends = ending.tokens
    until = ending.texts
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
        eos_token_id=list(ends) or None,
        stopping_criteria=StoppingCriteriaList(criteria),
    )
    answers = []
    for tokens in output[:, width:].tolist():
        kept = ending.before_end(tokens)
        text = str(tokenizer.decode(kept, skip_special_tokens=True))
        answers.append(_answer(text, len(kept) < len(tokens), until))
    return answers


@dataclass(frozen=True)
class _Ending:
    """What ends an answer."""

    tokens: tuple[int, ...]
    texts: tuple[str, ...]

    def before_end(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens before the first one that ends the answer."""
        kept = []
        for token in tokens:
            if token in self.tokens:
                break
            kept.append(token)
        return kept


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
        ended = [stop_position(text, self.until) is not None for text in texts]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]


def _answer(text: str, ended: bool, until: Sequence[str]) -> Answer:
    position = stop_position(text, until)
    if position is None:
        return Answer(text, ended)
    return Answer(text[:position], ended=True)


def stop_position(text: str, until: Sequence[str]) -> int | None:
    """Return where the first of several texts begins; None if there is none."""
    positions = [text.index(end) for end in until if end in text]
    return min(positions, default=None)


def all_end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, further: Sequence[int]
) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of training, the tokenizer's and the model's."""
    settings = model.generation_config
    own = settings.eos_token_id if settings is not None else None
    of_model = own if isinstance(own, list) else [own]
    named = [*further, tokenizer.eos_token_id, *of_model]
    present = [int(token) for token in named if token is not None]
    return tuple(dict.fromkeys(present))


def _reason_to_leave_out(example: _HeldOutExample, config: GenerationConfig) -> str | None:
    """Return why a prompt is not answered; None if it is.

    A truncated question has another answer than the complete one.
    """
    prompt_tokens = example.prompt_tokens
    kept = len(example.ids)
    if prompt_tokens > kept:
        return f"its prompt of {prompt_tokens:,} tokens is truncated to data.max_tokens {kept:,}"
    return too_long(prompt_tokens + config.max_new_tokens, config.context)


def _prompt(
    index: int,
    example: _HeldOutExample,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
) -> HeldOutPrompt:
    """Return the prompt of a held-out example that has one."""
    tokens = example.ids[: example.prompt_tokens]
    exact_text = str(tokenizer.decode(tokens))
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return HeldOutPrompt(
        index=index,
        tokens=tokens,
        text=text.strip(),
        prompt_sha256=digest([exact_text, example.reference]),
        reference=example.reference,
        left_out=_reason_to_leave_out(example, config),
    )


def _left_out(prompt: HeldOutPrompt, reason: str) -> LeftOutRecord:
    return LeftOutRecord(
        kind="generation",
        id=prompt.index,
        benchmark=ANSWERS,
        prompt_sha256=prompt.prompt_sha256,
        prompt=prompt.text,
        reference=prompt.reference,
        left_out=reason,
    )


def _scored(
    prompts: Sequence[HeldOutPrompt], answers: Sequence[Answer], config: GenerationConfig
) -> Iterator[GenerationRecord]:
    """Yield the record of each answer, with its metrics and errors."""
    verdicts = _verdicts(prompts, answers, config)
    for prompt, answer, verdict in zip(prompts, answers, verdicts, strict=True):
        text = answer.text.strip()
        metrics, errors = measure(config.metrics, text, prompt.reference, prompt.text)
        if isinstance(verdict, str):
            errors[EXECUTION] = verdict
        elif verdict is not None:
            metrics[EXECUTION] = verdict
        yield GenerationRecord(
            id=prompt.index,
            benchmark=ANSWERS,
            prompt_sha256=prompt.prompt_sha256,
            prompt=prompt.text,
            reference=prompt.reference,
            answer=text,
            metrics=metrics,
            errors=errors,
            ended=answer.ended,
        )


def _verdicts(
    prompts: Sequence[HeldOutPrompt], answers: Sequence[Answer], config: GenerationConfig
) -> Sequence[Verdict | None]:
    """Return the verdict of the recipe's command on each answer; None if it names no command."""
    if not config.argv:
        return [None] * len(prompts)
    inputs = []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = answer.text.strip()
        inputs.append({"prompt": prompt.text, "answer": text, "reference": prompt.reference})
    return execute(config.argv, inputs, config.seconds)
