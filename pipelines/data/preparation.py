"""Prepare the data: template, tokenise, mark what is learnt, split by group, save with a digest.

    python -m pipelines.data.preparation STAGE_FOLDER

Each example becomes `input_ids` and, for every token, whether it is `supervised`: all of a text, the completion of a
prompt, the assistant's turns of a conversation. The splits are Arrow folders beside result.json: `train`, `validation`,
which models are compared on, and `tuning`, which a control's rate is chosen on.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from datasets import Dataset, disable_progress_bars
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipelines.data.sources import load_rows, shape_of
from pipelines.errors import DataError
from pipelines.models.tokenizer import load_tokenizer
from pipelines.runtime.child import run_stage
from pipelines.runtime.stage import digest

HELD_OUT_SHARE = 0.1
"""Share of the groups from which the validation examples are drawn."""
Piece = tuple[str, bool]
"""A stretch of text and whether it is supervised."""


@dataclass(frozen=True)
class Example:
    """One row, tokenised."""

    input_ids: list[int]
    supervised: list[bool]
    """True where the token is learnt; aligned with input_ids."""
    prompt_tokens: int
    """Tokens before the last supervised stretch: what generation starts from. More than `input_ids` has where that was cut
    within them; then nothing is generated."""
    reference: str
    """The text of the last supervised stretch."""
    group: str
    was_cut: bool


def prepare(
    folder: Path, inputs: dict[str, Any], paths: dict[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Write the splits."""
    disable_progress_bars()
    settings = inputs["data"]
    rows = load_rows(settings | {name: paths[name] for name in ("source",) if name in paths})
    tokenizer = load_tokenizer(
        Path(paths["base"]), trust_remote_code=inputs.get("trust_remote_code", False)
    )
    examples = list(tokenize(rows, tokenizer, settings))
    usable = [example for example in examples if any(example.supervised)]
    if not usable:
        raise DataError(
            f"all {len(examples)} completions of {settings['source']!r} are cut off by max_tokens={settings['max_tokens']}; "
            "raise it or shorten the prompts"
        )
    splits = split_by_group(usable, settings["validation_examples"], inputs["seed"])
    train, validation = splits["train"], splits["validation"]
    files = [name for split, part in splits.items() if part for name in _save(part, folder, split)]
    figures = {
        "rows": len(rows),
        "left_out": len(examples) - len(usable),
        "cut": sum(example.was_cut for example in usable),
        "cut_held_out": sum(example.was_cut for example in validation),
        "train_examples": len(train),
        "validation_examples": len(validation),
        "tuning_examples": len(splits["tuning"]),
        "train_tokens": sum(len(example.input_ids) for example in train),
        "supervised_tokens": sum(sum(example.supervised) for example in train),
        "digest": digest(
            {
                split: [[one.input_ids, one.supervised] for one in part]
                for split, part in splits.items()
            }
        ),
    }
    return figures, files


def tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> Iterator[Example]:
    """Yield an Example for each row, cut on the right to `max_tokens`."""
    shape = shape_of(rows.column_names, settings["source"])
    group_column = settings["group_column"] or ("group" if "group" in rows.column_names else None)
    if group_column and group_column not in rows.column_names:
        raise DataError(
            f"group_column {group_column!r} is none of {', '.join(rows.column_names)}; name a column or leave it out"
        )
    for number, row in enumerate(rows, start=1):
        pieces = _pieces(row, shape, tokenizer, number)
        group = str(row[group_column]) if group_column else _asked(pieces)
        yield _example(pieces, tokenizer, group, settings["max_tokens"])


def split_by_group(
    examples: list[Example], validation_examples: int, seed: int
) -> dict[str, list[Example]]:
    """Hold out `validation_examples` from groups drawn by seed, and of what is left of those groups up to as many for tuning.

    No group is in `train` and in another split. Seed and group alone decide on which side a group lies, so that rows which
    come later move none: what one run held out, no later run trains on. Only where a tenth of the groups holds too few
    examples do the next ones follow.

    Raises:
        DataError: too few rows or groups to hold that many out and still train on most.
    """
    members = Counter(example.group for example in examples)
    held_out: set[str] = set()
    for place, group in sorted((hash_uniform(seed, group), group) for group in members):
        if (
            place >= HELD_OUT_SHARE
            and sum(members[name] for name in held_out) >= validation_examples
        ):
            break
        held_out.add(group)
    candidates = [example for example in examples if example.group in held_out]
    train = [example for example in examples if example.group not in held_out]
    if len(train) < validation_examples or len(candidates) < validation_examples:
        raise DataError(
            f"{len(examples)} usable rows in {len(members)} groups are too few to hold out validation_examples={validation_examples} "
            f"and train on at least as many; lower validation_examples or bring more rows"
        )
    drawn = sorted(
        candidates, key=lambda example: hash_uniform(seed, example.input_ids, example.supervised)
    )[: 2 * validation_examples]
    return {
        "train": train,
        "validation": drawn[:validation_examples],
        "tuning": drawn[validation_examples:],
    }


def _asked(pieces: list[Piece]) -> str:
    """Return a digest of what is asked, or of the text where nothing is: rows that share it are a group."""
    return digest(
        [text for text, is_supervised in pieces if not is_supervised]
        or [text for text, _ in pieces]
    )


def hash_uniform(seed: int, *what: Any) -> float:
    """Return a number in [0, 1) that seed and thing decide, whatever stands beside it."""
    return int(digest([seed, *what])[:13], 16) / 16**13


def _pieces(
    row: dict[str, Any], shape: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, number: int
) -> list[Piece]:
    """Cut a row into stretches that are learnt or not."""
    values = [row[name] for name in shape]
    for name, value in zip(shape, values, strict=True):
        _check_cell(name, value, number)
    end = str(tokenizer.eos_token or "")
    if shape == ("text",):
        return [(values[0] + end, True)]
    if shape == ("messages",):
        return _turns(values[0], tokenizer, number)
    if tokenizer.chat_template:
        return _turns(
            [{"role": "user", "content": values[0]}, {"role": "assistant", "content": values[1]}],
            tokenizer,
            number,
        )
    return [(values[0], False), (values[1] + end, True)]


def _check_cell(name: str, value: Any, number: int) -> None:
    """Refuse what is empty, or of another kind than its column holds."""
    if value in (None, "", []):
        raise DataError(f"row {number} has an empty {name}; fill or remove it")
    kind, words = (list, "a list of role and content") if name == "messages" else (str, "text")
    if not isinstance(value, kind):
        raise DataError(
            f"row {number} has {shortened(value)} as its {name}, where {words} belongs; write it so or remove the row"
        )


def _check_messages(messages: list[Any], number: int) -> None:
    """Refuse a conversation that opens with an answer, or has an answer without text."""
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(
                f"row {number} has {shortened(message)} among its messages; each is a role and a content, so write it as both"
            )
        if message.get("role") != "assistant":
            continue
        if index == 0:
            raise DataError(
                f"row {number} opens with the assistant, which then answers nothing; put a message of role 'user' before it"
            )
        if not isinstance(message.get("content"), str) or not message["content"]:
            content = shortened(message.get("content"))
            raise DataError(
                f"row {number} has {content} as the content of an assistant's turn, where text belongs; fill it or remove the row"
            )


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    number: int,
    *,
    opens_answer: bool = False,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opens_answer
            )
        )
    except (TypeError, ValueError, TemplateError) as error:
        raise DataError(
            f"row {number} does not fit the base's chat template ({error}); mend or remove it"
        ) from error


def _turns(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, number: int
) -> list[Piece]:
    """Render a conversation so that only what the assistant says, up to its end mark, is supervised."""
    if not tokenizer.chat_template:
        raise DataError(
            "the rows are conversations but the base's tokenizer has no chat template; use prompt and completion instead"
        )
    _check_messages(messages, number)
    pieces: list[Piece] = []
    done = ""
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = _rendered(tokenizer, messages[:index], number, opens_answer=True)
        after = _rendered(tokenizer, messages[: index + 1], number)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"row {number}: the chat template rewrites earlier turns, so its answers cannot be told apart; use prompt and completion"
            )
        answer, mark, _ = after[len(before) :].rpartition(str(tokenizer.eos_token))
        pieces += [
            (before[len(done) :], False),
            (answer + mark if mark else after[len(before) :], True),
        ]
        done = before + pieces[-1][0]
    if not pieces:
        raise DataError(
            f"row {number} has no message of role 'assistant'; there is nothing to learn from it"
        )
    return pieces


def _example(
    pieces: list[Piece], tokenizer: PreTrainedTokenizerBase, group: str, max_tokens: int
) -> Example:
    opening = (
        [] if tokenizer.chat_template else tokenizer("").input_ids
    )  # a template writes its own beginning mark
    input_ids, supervised, prompt_tokens = list(opening), [False] * len(opening), 0
    for text, is_supervised in pieces:
        prompt_tokens = len(input_ids) if is_supervised else prompt_tokens
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        input_ids += tokens
        supervised += [is_supervised] * len(tokens)
    supervised[0] = False  # nothing comes before the first token that could predict it
    reference = pieces[-1][0].removesuffix(str(tokenizer.eos_token or "")).strip()
    was_cut = len(input_ids) > max_tokens
    return Example(
        input_ids[:max_tokens], supervised[:max_tokens], prompt_tokens, reference, group, was_cut
    )


def _save(examples: list[Example], folder: Path, split: str) -> list[str]:
    Dataset.from_list([vars(example) for example in examples]).save_to_disk(str(folder / split))
    return [f"{split}/{path.name}" for path in sorted((folder / split).glob("*.arrow"))]


if __name__ == "__main__":
    run_stage(prepare)
