"""Rows from where the user keeps them: a local file, a hub data set, or the interpreter's own library.

A row has one of the three usual shapes: `text`; `prompt` and `completion`; `messages` (a list of role and content).
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError

from pipelines.config.recipe import local_path
from pipelines.data.stdlib_docstrings import harvest
from pipelines.errors import DataError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SHAPES = (("messages",), ("prompt", "completion"), ("text",))
DOCSTRINGS = "docstrings"


def load_rows(settings: dict[str, Any]) -> Dataset:
    """Load the rows that a recipe's data section names.

    Raises:
        DataError: the source is missing, empty or malformed (with the line), or has none of the three shapes.
    """
    source = str(settings["source"])
    if source == DOCSTRINGS:
        rows = Dataset.from_list(list(harvest(settings["max_source_characters"])))
    elif Path(source).suffix in BUILDERS:
        rows = _from_file(local_path(source))
    else:
        rows = _from_hub(source, settings["revision"], settings["split"])
    if len(rows) == 0:
        raise DataError(f"data source {source!r} holds no rows; give at least a few hundred")
    shape_of(rows.column_names, source)
    return rows


def shape_of(columns: list[str], source: str) -> tuple[str, ...]:
    """Return which of the three shapes the columns have."""
    for shape in SHAPES:
        if set(shape) <= set(columns):
            return shape
    raise DataError(
        f"data source {source!r} has columns {', '.join(columns)}; rename them to text, to prompt and completion, or to messages"
    )


def _from_file(path: Path) -> Dataset:
    if not path.is_file():
        raise DataError(
            f"data file {str(path)!r} is not there; give a path relative to the recipe or to where the command runs, or an absolute one"
        )
    if path.stat().st_size == 0:
        raise DataError(f"data file {str(path)!r} is empty; give at least a few hundred rows")
    if path.suffix == ".jsonl":
        _check_lines(path)
    try:
        with (
            TemporaryDirectory() as cache
        ):  # the usual cache knows a file by path and time, not by what is in it
            builder = load_dataset_builder(
                BUILDERS[path.suffix], data_files=str(path), cache_dir=cache
            )
            builder.download_and_prepare()
            has_rows = builder.info.splits["train"].num_examples > 0
            return (
                builder.as_dataset("train", in_memory=True) if has_rows else Dataset.from_list([])
            )
    except (DatasetsError, ValueError, OSError) as error:
        reason = error.__cause__ or error
        raise DataError(
            f"data file {str(path)!r} cannot be read as {BUILDERS[path.suffix]}: {_first_line(reason)}; mend it"
        ) from error


def _from_hub(source: str, revision: str | None, split: str) -> Dataset:
    try:
        return load_dataset(source, revision=revision, split=split)
    except (DatasetsError, ValueError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise DataError(
            f"data source {source!r} is no file ending in {', '.join(BUILDERS)} and cannot be loaded from the hub{offline}: "
            f"{_first_line(error.__cause__ or error)}; give such a file, or fetch the data set once while online"
        ) from error


def _check_lines(path: Path) -> None:
    """Refuse the first line that is no JSON object in UTF-8, by number."""
    with path.open("rb") as stream:
        for number, content in enumerate(stream, start=1):
            try:
                line = content.decode(
                    "utf-8-sig" if number == 1 else "utf-8"
                )  # some editors mark a file's start
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise DataError(
                        f'line {number} of {str(path)!r} is no JSON object; each line is one, such as {{"text": …}}'
                    )
            except UnicodeDecodeError as error:
                raise DataError(
                    f"line {number} of {str(path)!r} is no UTF-8 ({error}); save the file as UTF-8"
                ) from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"line {number} of {str(path)!r} is no JSON ({error}); mend or remove it"
                ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
