"""A source is a file, a hub data set or the standard library; a setting without effect is refused.

A file is read as it is now, not from a cache.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from loaded_rows import load, write

from pipelines.data.sources import row_store
from pipelines.errors import DataError

Values = dict[str, Any]
TEXTS = [{"text": "one"}, {"text": "two"}]
ROWS = '{"text": "one"}\n{"text": "two"}\n'
CONTENTS = {
    "rows.jsonl": ROWS,
    "rows.json": json.dumps(TEXTS),
    "rows.csv": "text\none\ntwo\n",
    "rows.tsv": "text\none\ntwo\n",
    "rows.txt": "one\n\ntwo\n",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_each_text_format_is_read(tmp_path: Path, name: str) -> None:
    loaded = load(write(tmp_path / name, CONTENTS[name]))
    assert loaded.rows == TEXTS
    assert loaded.columns == ("text",)
    assert (loaded.facts.rows, loaded.facts.files, loaded.facts.encoding) == (2, 1, "utf-8")


def test_suffixes_are_recognized_in_any_case(tmp_path: Path) -> None:
    assert load(write(tmp_path / "ROWS.JSONL", ROWS)).rows == TEXTS
    assert load(write(tmp_path / "rows.Csv", "text\none\ntwo\n")).rows == TEXTS


def test_text_lines_keep_everything_but_their_ends(tmp_path: Path) -> None:
    lines = ["  indented ", "form\x0cfeed", "line\u2028separator", "last"]
    path = write(tmp_path / "rows.txt", "\r\n".join(lines))
    loaded = load(path)
    assert [row["text"] for row in loaded.rows] == lines
    assert loaded.places[2] == "line 3 of 'rows.txt'"


def test_the_standard_library_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "def f(): ...", "completion": "Return nothing.", "group": "g"}]
    limits: list[int] = []

    def pairs(max_characters: int) -> Iterator[Values]:
        limits.append(max_characters)
        return iter(rows)

    monkeypatch.setattr("pipelines.data.sources.loading_rows.stdlib_pairs", pairs)
    loaded = load("docstrings")
    assert loaded.rows == rows
    assert loaded.facts.format == "docstrings"
    assert limits == [700]


def test_a_file_is_read_as_it_is_now(tmp_path: Path) -> None:
    """A copy that keeps another file's modification time does not return that file's rows."""
    path = write(tmp_path / "rows.jsonl", '{"text": "old"}\n')
    load(path)
    times = path.stat()
    write(path, '{"text": "new"}\n')
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load(path).rows == [{"text": "new"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt"])
def test_the_error_for_a_missing_file_names_its_path(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"absent.{suffix}"
    with pytest.raises(DataError, match="does not exist; give an absolute path") as refused:
        load(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("name", CONTENTS)
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is empty") as refused:
        load(write(tmp_path / name, ""))
    assert str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", "\n\n"), ("rows.csv", "prompt,completion\n"), ("rows.json", "[]")],
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError, match="has no rows"):
        load(write(tmp_path / name, content))


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.xlsx.*\.jsonl, \.json, \.csv.*\.gz, \.zst"):
        load(write(tmp_path / "rows.xlsx", "x"))


@pytest.mark.parametrize("source", ["someone/some-rows", "rows"])
def test_a_hub_name_is_refused_while_offline(source: str) -> None:
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set") as refused:
        load(source)
    assert repr(source) in str(refused.value)
    assert ".jsonl, .json, .csv, .tsv, .parquet" in str(refused.value)


def test_hub_rows_are_those_of_the_configured_split(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[Any, ...]] = []

    def load_dataset(source: str, *, name: str, revision: str, split: str) -> datasets.Dataset:
        requests.append((source, name, revision, split))
        return datasets.Dataset.from_list(TEXTS)

    monkeypatch.setattr("pipelines.data.sources.hub.load_dataset", load_dataset)
    loaded = load("someone/rows", config="main", revision="v1", split="test[:2]")
    load("someone/rows")
    assert requests == [
        ("someone/rows", "main", "v1", "test[:2]"),
        ("someone/rows", None, None, "train"),
    ]
    assert loaded.rows == TEXTS
    assert loaded.places[1] == "row 2 of 'someone/rows'"


@pytest.mark.parametrize(
    ("source", "setting"),
    [
        ("rows.jsonl", "delimiter"),
        ("rows.jsonl", "config"),
        ("rows.jsonl", "revision"),
        ("rows.jsonl", "split"),
        ("rows.json", "split"),
        ("rows.txt", "delimiter"),
        ("docstrings", "split"),
        ("docstrings", "encoding"),
        ("someone/rows", "encoding"),
        ("someone/rows", "delimiter"),
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path: Path, source: str, setting: str) -> None:
    if source in CONTENTS:
        source = str(write(tmp_path / source, CONTENTS[source]))
    with pytest.raises(DataError, match=rf"data\.{setting} 'x' has no effect on .*remove it"):
        load(source, **{setting: "x"})


def test_a_split_of_a_plain_file_points_to_the_number_of_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.split 'train\[:20\]' has no effect.*max_rows"):
        load(write(tmp_path / "rows.jsonl", ROWS), split="train[:20]")


def test_a_missing_home_folder_is_refused() -> None:
    with pytest.raises(DataError, match=r"~nobody_of_this_name/rows\.jsonl"):
        load("~nobody_of_this_name/rows.jsonl")


def test_many_rows_are_stored_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "BATCH_ROWS", 10)
    rows = (row_store.make_row(f"row {n}", {"text": str(n)}) for n in range(35))
    stored = row_store.store_rows(row_store.OpenedRows("test", rows), "test", tmp_path)
    assert [row["text"] for _, row in stored] == [str(n) for n in range(35)]
    [file] = stored.table.cache_files
    with pyarrow.memory_map(file["filename"]) as source:
        sizes = [batch.num_rows for batch in pyarrow.ipc.open_stream(source)]
    assert sizes == [10, 10, 10, 5]


def test_rows_with_much_text_are_stored_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_store, "BATCH_CHARACTERS", 100)
    rows = (row_store.make_row(f"row {n}", {"text": "x" * 200}) for n in range(3))
    stored = row_store.store_rows(row_store.OpenedRows("test", rows), "test", tmp_path)
    [file] = stored.table.cache_files
    with pyarrow.memory_map(file["filename"]) as source:
        sizes = [batch.num_rows for batch in pyarrow.ipc.open_stream(source)]
    assert sizes == [1, 1, 1]


def test_finding_files_imports_neither_torch_nor_datasets() -> None:
    code = (
        "import sys, pipelines.data.sources.file_discovery; "
        "print(*{'torch', 'datasets'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("", "")
