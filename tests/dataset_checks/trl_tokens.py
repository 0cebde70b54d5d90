"""The tokens of a row by TRL: of each answer, the tokens before it and its own.

TRL's own preparation is called without a trainer, so that no model is needed. Each answer is given
as a completion, and the turns before it as its prompt.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from tempfile import gettempdir
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from dataset_checks.observed import supervised_runs
from pipelines.data.rendering.example import Example

IGNORED = -100
READABLE = (
    {"text"},
    {"messages"},
    {"messages", "tools"},
    {"conversations"},
    {"prompt", "completion"},
)
"""Columns that TRL reads as we do."""
Split = tuple[tuple[int, ...], tuple[int, ...]]
"""The tokens before an answer, and those of the answer."""
ROLES = {"human": "user", "gpt": "assistant"}


def trl_config(**changes: Any) -> SFTConfig:
    """Return a config for preparation alone."""
    defaults = {"max_length": None, "use_cpu": True, "bf16": False, "report_to": "none"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about defaults of its own class
        return SFTConfig(output_dir=gettempdir(), **{**defaults, **changes})


def trl_prepare(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    *,
    chat_template: str | None = None,
) -> Dataset:
    """Return rows as SFTTrainer prepares them.

    Args:
        rows: in one of TRL's schemas.
        tokenizer: with its chat template.
        config: of the trainer.
        chat_template: with marks around the answers, if only these are learned.
    """
    logging.getLogger("trl").setLevel(logging.ERROR)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=chat_template, completion_only_loss=True
    )
    return SFTTrainer._prepare_dataset(trainer, rows, tokenizer, config, False, None, "train")


def trl_splits(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[Split, ...] | None:
    """Return the tokens of each answer of a row; None if TRL reads such rows differently."""
    splits = []
    for given in _rows_for_trl(row, tokenizer):
        [prepared] = trl_prepare(Dataset.from_list([given]), tokenizer, trl_config())
        splits.append(_split(prepared["input_ids"], prepared["labels"], tokenizer))
    return tuple(splits) or None


def our_splits(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> tuple[Split, ...]:
    """Return the tokens of each answer of examples."""
    splits = []
    for example in examples:
        for start, end in supervised_runs(example.supervised):
            answer = _without_final_space(example.input_ids[start:end], tokenizer)
            splits.append((tuple(example.input_ids[:start]), answer))
    return tuple(splits)


def _rows_for_trl(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Yield a text, or each answer of a row with what precedes it as a conversational pair."""
    if set(row) not in READABLE:
        return
    if "text" in row:
        yield dict(row)
        return
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    if "completion" not in row:
        turns = row.get("messages") or row["conversations"]
        if isinstance(turns, list):
            yield from ({**pair, **tools} for pair in _answers(turns))
        return
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and tokenizer.chat_template:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str) and isinstance(prompt, list):
        completion = [{"role": "assistant", "content": completion}]
    yield {"prompt": prompt, "completion": completion}


def _answers(turns: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    converted = [_with_usual_keys(turn) for turn in turns]
    for index, turn in enumerate(converted):
        if index and turn["role"] == "assistant":
            yield {"prompt": converted[:index], "completion": [turn]}


def _with_usual_keys(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn without the keys of ShareGPT."""
    if "from" not in turn:
        return dict(turn)
    return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}


def _split(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Split:
    start = next(index for index, label in enumerate(labels) if label != IGNORED)
    start = max(start, 1)  # nothing predicts the first token of a text
    return tuple(ids[:start]), _without_final_space(ids[start:], tokenizer)


def _without_final_space(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens up to the last one that is not white space, which ends the answer."""
    end = len(ids)
    while end and not tokenizer.decode([ids[end - 1]]).strip():
        end -= 1
    return tuple(ids[:end])
