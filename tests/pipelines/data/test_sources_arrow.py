"""Parquet files, Arrow files and saved data sets give the rows that were written to them."""

import datetime
import decimal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from loaded_rows import load, load_held_out, write

from pipelines.errors import DataError

Values = dict[str, Any]
Save = Callable[[pyarrow.Table, Path], Path]
CONVERSATIONS: list[Values] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "user", "content": "c"}]},
]


def save_parquet(table: pyarrow.Table, folder: Path) -> Path:
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def save_stream(table: pyarrow.Table, folder: Path) -> Path:
    with pyarrow.ipc.new_stream(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


def save_file(table: pyarrow.Table, folder: Path) -> Path:
    with pyarrow.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


def save_folder(table: pyarrow.Table, folder: Path) -> Path:
    Dataset(table).save_to_disk(str(folder / "saved"))
    return folder / "saved"


each_container = pytest.mark.parametrize(
    "save", [save_parquet, save_stream, save_file, save_folder]
)


@each_container
def test_rows_are_read_as_they_were_written(tmp_path: Path, save: Save) -> None:
    rows = [
        {"prompt": "007", "count": 5, "score": 0.5, "flag": True, "list": ["a", None]},
        {"prompt": None, "count": None, "score": None, "flag": None, "list": None},
        {"prompt": "2024-03-05\u2028\u0000", "count": -1, "score": 1.0, "flag": False, "list": []},
    ]
    loaded = load(save(pyarrow.Table.from_pylist(rows), tmp_path))
    assert loaded.rows == rows
    assert loaded.columns == ("prompt", "count", "score", "flag", "list")
    assert loaded.places[2].startswith("row 3 of '")


@each_container
def test_fields_that_only_other_rows_have_are_left_out(tmp_path: Path, save: Save) -> None:
    """Arrow adds them with null to every struct of a column."""
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": "1"}}]}
    rows = [*CONVERSATIONS, {"messages": [call, {"role": "tool", "content": "1"}]}]
    assert load(save(pyarrow.Table.from_pylist(rows), tmp_path)).rows == rows


def test_rows_of_many_batches_are_read(tmp_path: Path) -> None:
    table = pyarrow.table({"number": list(range(2500))})
    for save in (save_parquet, save_file):
        loaded = load(save(table, tmp_path))
        assert [row["number"] for row in loaded.rows] == list(range(2500))
        assert loaded.places[2499].startswith("row 2500 of ")


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ],
)
def test_each_type_of_text_is_text(tmp_path: Path, kind: pyarrow.DataType) -> None:
    table = pyarrow.table({"text": pyarrow.array(["a", None, "a"], kind)})
    rows = [{"text": "a"}, {"text": None}, {"text": "a"}]
    assert load(save_file(table, tmp_path)).rows == rows


@pytest.mark.parametrize(
    "kind", [pyarrow.large_list, pyarrow.list_view, lambda item: pyarrow.list_(item, 2)]
)
def test_each_type_of_list_is_a_list(
    tmp_path: Path, kind: Callable[[pyarrow.DataType], pyarrow.DataType]
) -> None:
    values = pyarrow.array([["a", "b"], None], kind(pyarrow.string()))
    loaded = load(save_file(pyarrow.table({"texts": values}), tmp_path))
    assert loaded.rows == [{"texts": ["a", "b"]}, {"texts": None}]


def test_values_that_json_does_not_have_are_marked(tmp_path: Path) -> None:
    day = datetime.date(2024, 3, 5)
    row = {
        "text": "x",
        "day": day,
        "time": datetime.datetime(2024, 3, 5),
        "price": decimal.Decimal("1.50"),
        "bytes": b"x",
        "nested": [{"day": day, "text": "y"}],
        "missing": float("nan"),
    }
    [loaded] = load(save_parquet(pyarrow.Table.from_pylist([row]), tmp_path)).rows
    assert loaded == {
        "text": "x",
        "day": {"unsupported type": "date32[day]"},
        "time": {"unsupported type": "timestamp[us]"},
        "price": {"unsupported type": "decimal128(3, 2)"},
        "bytes": {"unsupported type": "binary"},
        "nested": [{"day": {"unsupported type": "date32[day]"}, "text": "y"}],
        "missing": {"unsupported type": "nan"},
    }


def test_json_values_of_a_table_are_decoded(tmp_path: Path) -> None:
    storage = pyarrow.array(['{"a": [1, null]}', None])
    column = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), storage)
    loaded = load(save_file(pyarrow.table({"tools": column}), tmp_path))
    assert loaded.rows == [{"tools": {"a": [1, None]}}, {"tools": None}]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_broken_file_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"PAR1 and no more")
    kind = path.suffix[1:]
    with pytest.raises(DataError, match=rf"rows\.{kind}' cannot be read as {kind}: .*fix the file"):
        load(path)


def test_repeated_column_names_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    with pytest.raises(DataError, match="two columns have the same name"):
        load(save_file(table, tmp_path))


@pytest.mark.parametrize("setting", ["encoding", "delimiter", "config", "revision"])
@each_container
def test_a_text_setting_without_effect_is_refused(tmp_path: Path, save: Save, setting: str) -> None:
    path = save(pyarrow.table({"text": ["a"]}), tmp_path)
    with pytest.raises(DataError, match=rf"data\.{setting} 'x' has no effect on"):
        load(path, **{setting: "x"})


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """A saved DatasetDict with 40 training rows and 4 validation rows."""
    train = Dataset.from_dict({"text": [f"train {n}" for n in range(40)]})
    held_out = Dataset.from_dict({"text": [f"held out {n}" for n in range(4)]})
    folder = tmp_path / "splits"
    DatasetDict(train=train, val=held_out).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, [f"train {n}" for n in range(40)]),
        ("train", [f"train {n}" for n in range(40)]),
        ("train[:3]", ["train 0", "train 1", "train 2"]),
        ("train[10%:20%]", [f"train {n}" for n in range(4, 8)]),
        ("train[-1:]+val[:1]", ["train 39", "held out 0"]),
        ("val", [f"held out {n}" for n in range(4)]),
    ],
)
def test_a_split_of_a_saved_data_set_is_read(
    splits: Path, split: str | None, expected: list[str]
) -> None:
    loaded = load(splits, split=split)
    assert [row["text"] for row in loaded.rows] == expected
    assert loaded.facts.format == "saved data set"


@pytest.mark.parametrize("split", ["test", "test[:3]", "train[", ""])
def test_an_unknown_split_is_refused_with_the_available_ones(splits: Path, split: str) -> None:
    with pytest.raises(DataError, match=r"data\.split .* is not a split of .* has train, val"):
        load(splits, split=split)


def test_a_saved_data_set_without_splits_has_parts(tmp_path: Path) -> None:
    path = save_folder(pyarrow.table({"text": ["a", "b", "c"]}), tmp_path)
    assert load(path, split="train[1:]").rows == [{"text": "b"}, {"text": "c"}]
    assert load_held_out(path) is None


def test_the_validation_split_is_held_out(splits: Path) -> None:
    held_out = load_held_out(splits)
    assert held_out is not None
    assert held_out.rows[0] == {"text": "held out 0"}
    assert load_held_out(splits, split="val") is None
    named = load_held_out(splits, validation_split="train[:2]")
    assert named is not None
    assert named.rows == [{"text": "train 0"}, {"text": "train 1"}]


def test_an_unknown_validation_split_is_refused(splits: Path) -> None:
    with pytest.raises(DataError, match=r"data\.validation_split 'test' is not a split of"):
        load_held_out(splits, validation_split="test")


def test_a_folder_of_saved_data_sets_is_refused(splits: Path) -> None:
    with pytest.raises(DataError, match="has saved data sets in train, val"):
        (splits / "dataset_dict.json").unlink()
        load(splits)
