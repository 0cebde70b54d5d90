"""Load rows from a local file, a hub data set, or the interpreter's standard library.

A row has one of the three usual shapes: `text`; `prompt` and `completion`; `messages` (a list of
role and content).
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError

from pipelines.config.recipe import local_path
from pipelines.config.sections import DataSection
from pipelines.data.stdlib_docstrings import stdlib_pairs
from pipelines.errors import DataError, one_line

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SHAPES = (("messages",), ("prompt", "completion"), ("text",))
DOCSTRINGS = "docstrings"


def load_rows(settings: DataSection, source: str | None = None) -> Dataset:
    """Load the rows of a source.

    Args:
        settings: the recipe's data section.
        source: of a file, the path where it was found; by default as the section names it.

    Raises:
        DataError: the source is missing, empty or malformed (with the line), or has none of the
            three shapes.
    """
    source = source or settings.source
    if source == DOCSTRINGS:
        rows = Dataset.from_list(list(stdlib_pairs(settings.max_source_characters)))
    elif Path(source).suffix in BUILDERS:
        rows = _from_file(local_path(source))
    else:
        rows = _from_hub(source, settings.revision, settings.split)
    if len(rows) == 0:
        raise DataError(f"data source {source!r} has no rows; provide at least a few hundred")
    shape_of(rows.column_names, source)
    return rows


def shape_of(columns: list[str], source: str) -> tuple[str, ...]:
    """Return which of the three shapes the columns have."""
    for shape in SHAPES:
        if set(shape) <= set(columns):
            return shape
    raise DataError(
        f"data source {source!r} has columns {', '.join(columns)}; "
        "rename them to text, to prompt and completion, or to messages"
    )


def _from_file(path: Path) -> Dataset:
    if not path.is_file():
        raise DataError(
            f"data file {str(path)!r} does not exist; give an absolute path, "
            "or one relative to the recipe or to the working directory"
        )
    if path.stat().st_size == 0:
        raise DataError(f"data file {str(path)!r} is empty; provide at least a few hundred rows")
    if path.suffix == ".jsonl":
        _check_lines(path)
    kind = BUILDERS[path.suffix]
    try:
        return _read_file(path, kind)
    except (DatasetsError, ValueError, OSError) as error:
        reason = one_line(error.__cause__ or error, with_type=False)
        raise DataError(
            f"data file {str(path)!r} cannot be read as {kind}: {reason}; fix the file"
        ) from error


def _read_file(path: Path, kind: str) -> Dataset:
    # The default cache identifies a file by path and time, not by its content.
    with TemporaryDirectory() as cache:
        builder = load_dataset_builder(kind, data_files=str(path), cache_dir=cache)
        builder.download_and_prepare()
        if builder.info.splits["train"].num_examples == 0:
            return Dataset.from_list([])
        return builder.as_dataset("train", in_memory=True)


def _from_hub(source: str, revision: str | None, split: str) -> Dataset:
    try:
        return load_dataset(source, revision=revision, split=split)
    except (DatasetsError, ValueError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = one_line(error.__cause__ or error, with_type=False)
        raise DataError(
            f"data source {source!r} is not a file ending in {', '.join(BUILDERS)} "
            f"and cannot be loaded from the hub{offline}: {reason}; "
            "give such a file, or download the data set once while online"
        ) from error


def _check_lines(path: Path) -> None:
    """Raise DataError with the number of the first line that is not a JSON object in UTF-8."""
    with path.open("rb") as stream:
        for number, content in enumerate(stream, start=1):
            _check_line(content, number, path)


def _check_line(content: bytes, number: int, path: Path) -> None:
    where = f"line {number} of {str(path)!r}"
    encoding = "utf-8-sig" if number == 1 else "utf-8"  # some editors start a file with a mark
    try:
        line = content.decode(encoding)
        is_object = not line.strip() or isinstance(json.loads(line), dict)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not valid UTF-8 ({error}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON ({error}); fix or remove it") from error
    if not is_object:
        raise DataError(
            f'{where} is not a JSON object; each line must be one, such as {{"text": …}}'
        )
