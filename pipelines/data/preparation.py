"""Prepare the data: read, parse, render, tokenize, mark supervised tokens, split, save.

    python -m pipelines.data.preparation STAGE_FOLDER

    sources/            files, folders, addresses and data sets → rows as written
    schemas/            a row → a conversation or a text
    rendering/          conversation → tokens, supervised or not
    encoding_rows.py    all rows, in batches and processes
    usable.py           which examples are used; errors of rows
    splitting.py        examples → splits
    duplicates.py       held-out examples that resemble training examples

The splits are Arrow folders next to result.json: `train`; `validation`, on which models are
compared; and `tuning`, on which a control's learning rate is chosen. If the recipe changes the
tokenizer, the folder `tokenizer` has the changed one.
"""

import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase

from pipelines.config.data_section import DataSection, WeightedSource
from pipelines.data.duplicates import overlap
from pipelines.data.encoding_rows import STORED, EncodedSource, RowEncoder, encode
from pipelines.data.inspection import histogram, previews
from pipelines.data.rendering.example import Example
from pipelines.data.rendering.templates import prepared_tokenizer
from pipelines.data.rows import SourceRows
from pipelines.data.schemas.schema import Schema, detect_schema
from pipelines.data.sources.loading_rows import load_source, load_validation
from pipelines.data.splitting import Splits, split_examples
from pipelines.data.usable import UsableExamples, usable_examples
from pipelines.errors import DataError
from pipelines.models.tokenizer import CHANGED_TOKENIZER, load_tokenizer, template_digest
from pipelines.runtime.child import execute_stage
from pipelines.runtime.interfaces.inputs import DataInputs, StagePaths
from pipelines.runtime.interfaces.kinds import DATA
from pipelines.runtime.interfaces.results import DataResult, SplitOverlap
from pipelines.runtime.stage import digest

SCHEMA_ROWS = 100
"""Rows from which the schema is detected."""
HELD_OUT = ("validation", "tuning")
SCRATCH = "scratch"
"""Folder of the Arrow files that only preparation uses."""
COLUMNS = (*STORED, "key")


def prepare(folder: Path, inputs: DataInputs, paths: StagePaths) -> tuple[DataResult, list[str]]:
    """Write the splits; return their metrics and files.

    Args:
        folder: of the stage; gets one folder for each split.
        inputs: the data section, the base's identity and the seed.
        paths: where the base and the sources are on this host.

    Returns:
        the result, and the written files relative to `folder`.

    Raises:
        DataError: the rows cannot be read, learned or split as the recipe requires.
    """
    disable_progress_bars()
    settings = inputs.data
    base = load_tokenizer(paths.required("base"), trust_remote_code=inputs.trust_remote_code)
    tokenizer = prepared_tokenizer(base, _with_template_path(settings, paths))
    with _scratch(folder) as cache:
        sources = _encoded_sources(inputs, paths, tokenizer, cache)
        examples = usable_examples(sources, settings)
        splits = split_examples(
            examples.texts("group"),
            examples.texts("key"),
            own_validation=examples.own_validation,
            weights=examples.weights.tolist(),
            validation_examples=settings.validation_examples,
            seed=inputs.seed,
        )
        parts = _parts(examples, splits)
        result = _result(sources, examples, splits, parts, tokenizer)
        files = _save(parts, folder)
    if tokenizer is not base:
        tokenizer.save_pretrained(str(folder / CHANGED_TOKENIZER))
        files += _files_of(folder, CHANGED_TOKENIZER)
    return result, files


def _with_template_path(settings: DataSection, paths: StagePaths) -> DataSection:
    """Return the settings with the path of the chat template, if that is a file."""
    name = settings.chat_template
    if name is None or name not in paths.sources:
        return settings
    return settings.model_copy(update={"chat_template": paths.sources[name]})


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield an empty folder in the stage's, also if an earlier process was killed in this block."""
    scratch = folder / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def tokenize(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, settings: DataSection
) -> Iterator[Example]:
    """Yield the examples of rows that are in memory.

    Args:
        rows: as a file would have them.
        tokenizer: of the base, without the recipe's changes.
        settings: with one source, whose settings are used.

    Raises:
        DataError: a row cannot be learned as written; the message starts with its number.
    """
    all_rows = list(rows)
    columns = list(dict.fromkeys(name for row in all_rows for name in row))
    [source] = settings.all_sources
    first_rows = all_rows[:SCHEMA_ROWS]
    group_column = settings.group_column_of(source)
    schema = detect_schema(
        columns, first_rows, source, supervise=settings.supervise, group_column=group_column
    )
    encoder = RowEncoder(schema, prepared_tokenizer(tokenizer, settings), settings, group_column)
    for number, outcome in enumerate(encoder.encode(all_rows), start=1):
        if isinstance(outcome, DataError):
            raise DataError(f"row {number} {outcome}")
        yield from outcome


def _encoded_sources(
    inputs: DataInputs, paths: StagePaths, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> list[EncodedSource]:
    """Read and encode each source, and the user's own validation rows."""
    settings = inputs.data
    found = []
    for number, source in enumerate(settings.all_sources):
        path = paths.sources.get(source.source)
        rows = load_source(source, path=path, cache=cache, settings=settings)
        rows = _drawn(rows, source.max_rows, inputs.seed)
        file = cache / f"examples-{number}.arrow"
        found.append(_encoded(rows, source, settings, tokenizer, file))
    first = settings.all_sources[0]
    own = load_validation(
        settings,
        path=paths.sources.get(first.source),
        validation_path=paths.sources.get(settings.validation_source or ""),
        cache=cache,
    )
    if own is not None:
        file = cache / "examples-validation.arrow"
        name = settings.validation_source or first.source
        roles = {role: usual for role, usual in first.roles.items() if own.contains(role)}
        unweighted = first.model_copy(update={"weight": 1.0, "source": name, "roles": roles})
        encoded = _encoded(own, unweighted, settings, tokenizer, file)
        found.append(replace(encoded, held_out=True))
    return found


def _drawn(rows: SourceRows, count: int | None, seed: int) -> SourceRows:
    """Return as many rows as the recipe wants, drawn by the seed and in their order."""
    if count is None or count >= len(rows):
        return rows
    drawn = sorted(random.Random(seed).sample(range(len(rows)), count))
    return replace(rows, table=rows.table.select(drawn))


def _encoded(
    rows: SourceRows,
    source: WeightedSource,
    settings: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
) -> EncodedSource:
    group_column = settings.group_column_of(source)
    schema = _schema_of(rows, source, settings)
    _check_roles_occur(rows, source)
    facts = rows.facts.model_copy(
        update={
            "schema_name": schema.name,
            "used_columns": schema.used,
            "unused_columns": schema.unused,
        }
    )
    examples = encode(rows, RowEncoder(schema, tokenizer, settings, group_column), file)
    return EncodedSource(facts, len(rows), examples, source.weight)


def _check_roles_occur(rows: SourceRows, source: WeightedSource) -> None:
    """Refuse a role of `data.roles` that no row has."""
    for name in source.roles:
        if not rows.contains(name):
            raise DataError(
                f"data.roles has {name!r}, which occurs in no row of {source.source!r}, so it has "
                "no effect; correct its spelling or remove it"
            )


def _schema_of(rows: SourceRows, source: WeightedSource, settings: DataSection) -> Schema:
    first_rows = [values for _, values in islice(rows, SCHEMA_ROWS)]
    return detect_schema(
        rows.columns,
        first_rows,
        source,
        supervise=settings.supervise,
        group_column=settings.group_column_of(source),
    )


def _parts(examples: UsableExamples, splits: Splits) -> dict[str, Dataset]:
    """Return the examples of each split that is not empty."""
    indices = {
        "train": splits.train,
        "validation": splits.validation,
        "tuning": splits.tuning,
    }
    parts = {}
    for name, rows in indices.items():
        if len(rows):
            parts[name] = examples.select(rows, COLUMNS)
    return parts


def _result(
    sources: Sequence[EncodedSource],
    examples: UsableExamples,
    splits: Splits,
    parts: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
) -> DataResult:
    train = parts["train"]
    return DataResult(
        rows=sum(source.rows for source in sources),
        sources=tuple(source.facts for source in sources),
        bad_rows=examples.bad_rows,
        left_out=examples.left_out,
        cut=examples.cut,
        cut_held_out=examples.total("was_cut", splits.validation),
        train_examples=len(train),
        validation_examples=len(splits.validation),
        tuning_examples=len(splits.tuning),
        unused_examples=splits.unused,
        excluded_examples=splits.excluded,
        overlap=_overlap(parts, tokenizer),
        notes=examples.notes,
        end_tokens=examples.end_tokens,
        lengths=histogram(examples.numbers("length")),
        ends_supervised=examples.ends_supervised(splits.train),
        previews=previews(train, tokenizer),
        train_tokens=examples.total("length", splits.train),
        supervised_tokens=examples.total("supervised_tokens", splits.train),
        template_sha256=template_digest(tokenizer),
        digest=_digest(parts),
    )


def _overlap(parts: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase) -> SplitOverlap:
    """Compare the held-out examples with the training examples."""
    held_out = []
    for name in HELD_OUT:
        if name in parts:
            held_out += list(parts[name]["input_ids"])
    return overlap(parts["train"], held_out, decode=partial(_plain_text, tokenizer))


def _plain_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _digest(parts: Mapping[str, Dataset]) -> str:
    """Return a digest of what models are trained and evaluated on."""
    return digest({name: part["key"][:] for name, part in parts.items()})


def _save(parts: Mapping[str, Dataset], folder: Path) -> list[str]:
    files = []
    for name, part in parts.items():
        part.select_columns(list(STORED)).save_to_disk(str(folder / name))
        files += _files_of(folder, name)
    return files


def _files_of(folder: Path, name: str) -> list[str]:
    paths = sorted(path for path in (folder / name).iterdir() if path.is_file())
    return [f"{name}/{path.name}" for path in paths]


if __name__ == "__main__":
    execute_stage(DATA, prepare)
