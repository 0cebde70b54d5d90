"""Rows are read from each kind of file, in each of the three shapes.

An unreadable file is refused with its name and line, and a file is read as it is now, not from a
cache.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pipelines.config.sections import DataSection
from pipelines.data.sources import load_rows, shape_of
from pipelines.errors import DataError

Values = dict[str, Any]
Maker = Callable[..., DataSection]

TEXTS = [{"text": "one"}, {"text": "two"}]
PAIRS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ]
    },
]
SHAPES = {"text": TEXTS, "pairs": PAIRS, "messages": CONVERSATIONS}
FILES = [
    (shape, suffix)
    for shape in SHAPES
    for suffix in (".jsonl", ".json", ".csv", ".parquet")
    if (shape, suffix) != ("messages", ".csv")
]
UNUSABLE: dict[str, tuple[bytes, list[str]]] = {
    "empty.jsonl": (b"", ["is empty"]),
    "blank.jsonl": (b"\n\n", ["has no rows"]),
    "header.csv": (b"prompt,completion\n", ["has no rows"]),
    "none.json": (b"[]", ["has no rows"]),
    "line.jsonl": (b'{"text": "x"}\n{"text": \n', ["line 2", "not valid JSON", "fix or remove"]),
    "list.jsonl": (b'{"text": "x"}\n\n["text"]\n', ["line 3", "not a JSON object"]),
    "latin.jsonl": (b'{"text": "x"}\n{"text": "\xe9"}\n', ["line 2", "UTF-8"]),
    "half.json": (b'[{"text": ', ["as json"]),
    "open.csv": (b'prompt,completion\n"a,b\n', ["as csv"]),
    "latin.csv": (b"text\n\xe9t\xe9\n", ["as csv"]),
    "columns.jsonl": (
        b'{"question": "x", "answer": "y"}\n',
        ["question, answer", "rename them to text, to prompt and completion, or to"],
    ),
    "prompts.jsonl": (b'{"prompt": "x"}\n', ["columns prompt", "rename"]),
}
"""File → its bytes, and fragments of the error message, which also names the file."""


def save(rows: list[Values], path: Path) -> Path:
    """Write rows in the format that the file's ending names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def test_a_byte_order_mark_is_not_part_of_the_first_row(
    tmp_path: Path, data_settings: Maker
) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    assert list(load_rows(data_settings(path))) == TEXTS


@pytest.mark.parametrize(("shape", "suffix"), FILES)
def test_rows_are_read_as_they_were_written(
    tmp_path: Path, data_settings: Maker, shape: str, suffix: str
) -> None:
    loaded = load_rows(data_settings(save(SHAPES[shape], tmp_path / f"rows{suffix}")))
    assert loaded.to_list() == SHAPES[shape]


def test_blank_lines_are_not_rows(tmp_path: Path, data_settings: Maker) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n\n  \n{"text": "two"}\n')
    assert load_rows(data_settings(path)).to_list() == TEXTS


def test_the_standard_library_is_a_source(
    monkeypatch: pytest.MonkeyPatch, data_settings: Maker
) -> None:
    rows = [{"prompt": "def f(): ...", "completion": "Return nothing.", "group": "g"}]
    limits: list[int] = []

    def pairs(max_characters: int) -> Iterator[Values]:
        limits.append(max_characters)
        return iter(rows)

    monkeypatch.setattr("pipelines.data.sources.stdlib_pairs", pairs)
    assert load_rows(data_settings("docstrings", max_source_characters=321)).to_list() == rows
    assert limits == [321]


def test_a_file_is_read_as_it_is_now(write_rows: Callable[..., Path], data_settings: Maker) -> None:
    """A copy that keeps another file's modification time does not return that file's rows."""
    path = write_rows([{"text": "old"}])
    load_rows(data_settings(path))
    times = path.stat()
    write_rows([{"text": "new"}])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load_rows(data_settings(path)).to_list() == [{"text": "new"}]


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_file_is_refused(tmp_path: Path, data_settings: Maker, name: str) -> None:
    content, fragments = UNUSABLE[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        load_rows(data_settings(path))
    assert str(path) in str(refused.value)
    for fragment in fragments:
        assert fragment in str(refused.value)


def test_a_broken_parquet_file_is_refused(tmp_path: Path, data_settings: Maker) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"rows\.parquet' cannot be read as parquet"):
        load_rows(data_settings(path))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_the_error_for_a_missing_file_names_its_path(
    tmp_path: Path, data_settings: Maker, suffix: str
) -> None:
    path = tmp_path / f"absent.{suffix}"
    with pytest.raises(DataError, match="does not exist; give an absolute path") as refused:
        load_rows(data_settings(path))
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("source", ["someone/some-rows", "rows", "rows.txt"])
def test_a_hub_name_is_refused_while_offline(data_settings: Maker, source: str) -> None:
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set") as refused:
        load_rows(data_settings(source))
    assert repr(source) in str(refused.value)
    assert ".jsonl, .json, .csv, .parquet" in str(refused.value)


def test_a_folder_of_files_with_different_columns_is_refused(
    tmp_path: Path, data_settings: Maker
) -> None:
    save(PAIRS, tmp_path / "a.jsonl")
    save([{"number": 1}], tmp_path / "b.jsonl")
    with pytest.raises(DataError) as refused:
        load_rows(data_settings(tmp_path))
    assert str(tmp_path) in str(refused.value)


def test_a_missing_home_folder_is_refused(data_settings: Maker) -> None:
    with pytest.raises(DataError, match=r"~nobody_of_this_name/rows\.jsonl"):
        load_rows(data_settings("~nobody_of_this_name/rows.jsonl"))


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        (["text"], ("text",)),
        (["id", "completion", "prompt"], ("prompt", "completion")),
        (["messages", "text"], ("messages",)),
        (["prompt", "completion", "text"], ("prompt", "completion")),
        (["prompt", "text"], ("text",)),
    ],
)
def test_the_shape_with_most_structure_is_chosen(
    columns: list[str], shape: tuple[str, ...]
) -> None:
    assert shape_of(columns, "rows") == shape
