"""Greedy answers, and what each held-out prompt's answer is worth against its reference."""

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
"""Name under which what the recipe's command says is kept."""
ANSWERS = "answers"
"""Name under which the records of answers stand, as those of questions stand under their benchmark's."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    text: str
    ended: bool
    """Whether it came to an end by itself, before the most tokens it may write."""


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are had and judged; the same for every model."""

    max_new_tokens: int
    metrics: Mapping[str, Metric]
    argv: Sequence[str]
    """Command that judges an answer; empty for none."""
    seconds: float
    """Its longest time."""
    context: int | None
    """How many tokens the model takes; None where it does not say."""


def answer_records(
    reader: CheckedReader,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    judging: GenerationConfig,
) -> Iterator[Record]:
    """Yield, for each example with a prompt, the greedy answer and its figures, or why it is not asked."""
    prompted = {
        place: one
        for place, one in enumerate(examples)
        if one["prompt_tokens"] > 0 and one["reference"]
    }
    reasons = {place: _unasked(one, judging) for place, one in prompted.items()}
    prompts = {place: one["input_ids"][: one["prompt_tokens"]] for place, one in prompted.items()}
    asked = [place for place, reason in reasons.items() if reason is None]
    answers = dict(
        zip(
            asked,
            generate(
                reader, tokenizer, [prompts[place] for place in asked], judging.max_new_tokens
            ),
            strict=True,
        )
    )
    heads = {
        place: _head(place, prompts[place], one["reference"], tokenizer)
        for place, one in prompted.items()
    }
    judged = dict(
        zip(
            asked,
            _judged(
                [{**heads[place], "answer": answers[place].text.strip()} for place in asked],
                judging,
            ),
            strict=True,
        )
    )
    for place, head in heads.items():
        if place in judged:
            yield {**judged[place], "ended": answers[place].ended}
        else:
            yield {**head, "left_out": reasons[place]}


@torch.inference_mode()
def generate(
    reader: CheckedReader,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    until: Sequence[str] = (),
) -> list[Answer]:
    """Answer token prompts greedily, in batches of about one length where the model writes the same as on each alone.

    Args:
        reader: of the model.
        tokenizer: the base's; its end mark ends an answer, and so do those of the model's own settings.
        prompts: tokens of each prompt.
        max_new_tokens: longest answer.
        until: texts that end an answer as well; what begins with one is cut off.
    """
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    if not prompts:
        return []
    way = reader.generation(prompts)
    size = BATCH if way.batched else 1
    with attending_by(reader.model, way.attention):
        for start in range(0, len(order), size):
            part = order[start : start + size]
            answers |= zip(
                part,
                _batch(
                    reader.model,
                    tokenizer,
                    [prompts[place] for place in part],
                    max_new_tokens,
                    until,
                ),
                strict=True,
            )
    return [answers[place] for place in range(len(prompts))]


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    until: Sequence[str],
) -> list[Answer]:
    """Answer one batch, padded on the left."""
    width, ends = max(len(prompt) for prompt in prompts), _end_marks(model, tokenizer)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    ids, mask = padded(prompts, filler=filler, device=str(model.device))
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=filler,
        eos_token_id=ends or None,
        stopping_criteria=StoppingCriteriaList([_Until(tokenizer, width, until)] if until else []),
    )[:, width:].tolist()
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [
        _answer(text, any(token in ends for token in tokens), until)
        for text, tokens in zip(texts, output, strict=True)
    ]


class _Until(StoppingCriteria):
    """Ends an answer whose text holds one of several texts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, width: int, until: Sequence[str]
    ) -> None:
        self.tokenizer, self.width, self.until = tokenizer, width, until

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        ended = [any(end in text for end in self.until) for text in texts]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]


def _answer(text: str, ended: bool, until: Sequence[str]) -> Answer:
    places = [text.index(end) for end in until if end in text]
    return Answer(text[: min(places)] if places else text, ended or bool(places))


def _end_marks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, which training teaches, and the model's own."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(int(token) for token in named if token is not None))


def _unasked(example: Mapping[str, Any], judging: GenerationConfig) -> str | None:
    """Return why a prompt is not answered; None where it is. Half a question has another answer than the whole one."""
    whole, kept = example["prompt_tokens"], len(example["input_ids"])
    if whole > kept:
        return f"its prompt of {whole:,} tokens is cut to data.max_tokens {kept:,}"
    return too_long(whole + judging.max_new_tokens, judging.context)


def _head(
    place: int, prompt: list[int], reference: str, tokenizer: PreTrainedTokenizerBase
) -> Record:
    shown = str(tokenizer.decode(prompt, skip_special_tokens=True)).strip()
    return {
        "kind": "generation",
        "id": place,
        "benchmark": ANSWERS,
        "prompt": shown,
        "prompt_sha256": digest([str(tokenizer.decode(prompt)), reference]),
        "reference": reference,
    }


def _judged(records: Sequence[Record], judging: GenerationConfig) -> Iterator[Record]:
    """Yield the records with each answer's figures, and what went wrong."""
    asked = [
        {name: record[name] for name in ("prompt", "answer", "reference")} for record in records
    ]
    verdicts: Sequence[Verdict | None] = (
        execute(judging.argv, asked, judging.seconds) if judging.argv else [None] * len(asked)
    )
    for record, verdict in zip(records, verdicts, strict=True):
        values, errors = measure(
            judging.metrics, record["answer"], record["reference"], record["prompt"]
        )
        if isinstance(verdict, str):
            errors[EXECUTION] = verdict
        elif verdict is not None:
            values[EXECUTION] = verdict
        yield {**record, "metrics": values, "errors": errors}
