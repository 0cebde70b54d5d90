"""Prepare the data: render, tokenize, mark supervised tokens, split by group, save with a digest.

    python -m pipelines.data.preparation STAGE_FOLDER

    sources.py        rows of a file, of the hub or of the standard library
    rendering.py      a row → pieces of text, supervised or not
    example.py        pieces → `input_ids` and `supervised`
    splitting.py      examples → splits

The splits are Arrow folders next to result.json: `train`; `validation`, on which models are
compared; and `tuning`, on which a control's learning rate is chosen.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase

from pipelines.config.sections import DataSection
from pipelines.data.example import Example, build_example
from pipelines.data.rendering import Piece, render_row
from pipelines.data.sources import load_rows, shape_of
from pipelines.data.splitting import split_by_group
from pipelines.errors import DataError
from pipelines.models.tokenizer import load_tokenizer
from pipelines.runtime.child import execute_stage
from pipelines.runtime.interfaces.inputs import DataInputs, StagePaths
from pipelines.runtime.interfaces.kinds import DATA
from pipelines.runtime.interfaces.results import DataResult
from pipelines.runtime.stage import digest

Splits = dict[str, list[Example]]


def prepare(folder: Path, inputs: DataInputs, paths: StagePaths) -> tuple[DataResult, list[str]]:
    """Write the splits; return their metrics and files."""
    disable_progress_bars()
    settings = inputs.data
    rows = load_rows(settings, paths.source or settings.source)
    tokenizer = load_tokenizer(paths.required("base"), trust_remote_code=inputs.trust_remote_code)
    examples = list(tokenize(rows, tokenizer, settings))
    usable = [example for example in examples if any(example.supervised)]
    if not usable:
        raise DataError(
            f"all {len(examples)} completions of {settings.source!r} are cut off by "
            f"max_tokens={settings.max_tokens}; raise it or use shorter prompts"
        )
    splits = split_by_group(usable, settings.validation_examples, inputs.seed)
    files: list[str] = []
    for name, split in splits.items():
        if split:
            files += _save(split, folder, name)
    train = splits["train"]
    validation = splits["validation"]
    result = DataResult(
        rows=len(rows),
        left_out=len(examples) - len(usable),
        cut=sum(example.was_cut for example in usable),
        cut_held_out=sum(example.was_cut for example in validation),
        train_examples=len(train),
        validation_examples=len(validation),
        tuning_examples=len(splits["tuning"]),
        train_tokens=sum(len(example.input_ids) for example in train),
        supervised_tokens=sum(sum(example.supervised) for example in train),
        digest=_digest(splits),
    )
    return result, files


def tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: DataSection
) -> Iterator[Example]:
    """Yield an Example for each row, truncated on the right to `max_tokens`."""
    shape = shape_of(rows.column_names, settings.source)
    group_column = _group_column(rows, settings.group_column)
    for number, row in enumerate(rows, start=1):
        pieces = render_row(row, shape, tokenizer, number)
        group = str(row[group_column]) if group_column else _prompt_digest(pieces)
        yield build_example(pieces, tokenizer, group=group, max_tokens=settings.max_tokens)


def _group_column(rows: Dataset, name: str | None) -> str | None:
    """Return the configured column, the column `group` if there is one, or None."""
    if not name:
        return "group" if "group" in rows.column_names else None
    if name not in rows.column_names:
        raise DataError(
            f"group_column {name!r} is not one of {', '.join(rows.column_names)}; "
            "name a column or leave it out"
        )
    return name


def _prompt_digest(pieces: list[Piece]) -> str:
    """Return a digest of the prompt, or of the text if there is none; it identifies a group."""
    prompt = [text for text, is_supervised in pieces if not is_supervised]
    return digest(prompt or [text for text, _ in pieces])


def _digest(splits: Splits) -> str:
    """Return a digest of what models are trained and evaluated on."""
    content: dict[str, list[Any]] = {}
    for name, split in splits.items():
        content[name] = [[example.input_ids, example.supervised] for example in split]
    return digest(content)


def _save(examples: list[Example], folder: Path, split: str) -> list[str]:
    Dataset.from_list([vars(example) for example in examples]).save_to_disk(str(folder / split))
    return [f"{split}/{path.name}" for path in sorted((folder / split).glob("*.arrow"))]


if __name__ == "__main__":
    execute_stage(DATA, prepare)
