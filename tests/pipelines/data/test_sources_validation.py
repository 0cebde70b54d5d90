"""The user's held-out rows come from a split, from the names of files, or from another source."""

import gzip
from pathlib import Path

import pytest
from loaded_rows import held_out_texts, line, load_held_out, texts, write, write_files

from pipelines.config.data_section import DataSection, WeightedSource
from pipelines.data.sources.file_discovery import local_files
from pipelines.data.sources.loading_rows import load_validation
from pipelines.errors import DataError


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train.jsonl", "validation.jsonl"),
        ("train.jsonl", "test.jsonl"),
        ("train.jsonl.gz", "dev.jsonl"),
        ("rows.jsonl", "val.jsonl"),
        ("train/part-0.jsonl", "eval/part-0.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"),
        ("boxes_train.jsonl", "boxes_valid.jsonl"),
        ("Train.jsonl", "Validation.jsonl"),
    ],
)
def test_names_of_files_name_splits(tmp_path: Path, train: str, held_out: str) -> None:
    write_files(tmp_path, train, held_out)
    if train.endswith(".gz"):
        write(tmp_path / train, gzip.compress(line(train).encode()))
    assert texts(tmp_path) == [train]
    assert held_out_texts(tmp_path) == [held_out]
    files = {tmp_path / train, tmp_path / held_out}
    assert set(local_files(WeightedSource(source="x"), str(tmp_path))) == files


def test_validation_is_preferred_to_test(tmp_path: Path) -> None:
    write_files(tmp_path, "train.jsonl", "test.jsonl", "validation.jsonl")
    assert held_out_texts(tmp_path) == ["validation.jsonl"]
    assert held_out_texts(tmp_path, validation_split="test") == ["test.jsonl"]
    assert held_out_texts(tmp_path, split="validation") == ["test.jsonl"]


@pytest.mark.parametrize("name", ["test.jsonl", "validation.jsonl"])
def test_the_only_split_is_not_held_out(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, name)
    assert texts(tmp_path) == [name]
    assert held_out_texts(tmp_path) is None


def test_the_split_that_is_trained_on_cannot_be_held_out(tmp_path: Path) -> None:
    write_files(tmp_path, "train.jsonl", "test.jsonl")
    for settings in ({"validation_split": "train"}, {"split": "test", "validation_split": "test"}):
        with pytest.raises(DataError, match="is the split that is trained on; name another"):
            load_held_out(tmp_path, **settings)


def test_a_word_within_a_name_does_not_name_a_split(tmp_path: Path) -> None:
    write_files(tmp_path, "unit-test-questions.jsonl", "contest.jsonl", "evaluations.jsonl")
    assert len(texts(tmp_path)) == 3
    assert held_out_texts(tmp_path) is None


def test_a_json_file_with_splits_has_held_out_rows(tmp_path: Path) -> None:
    content = f'{{"train": [{line("a")}], "validation": [{line("b")}]}}'
    path = write(tmp_path / "rows.json", content)
    assert (texts(path), held_out_texts(path)) == (["a"], ["b"])


def test_a_split_of_a_plain_file_cannot_be_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", line("a"))
    assert held_out_texts(path) is None
    with pytest.raises(DataError, match=r"data\.validation_split 'test' has no effect"):
        load_held_out(path, validation_split="test")


def test_another_source_is_held_out(tmp_path: Path) -> None:
    """The encoding of the training rows applies to it, their split does not."""
    train = write(tmp_path / "train.csv", "text\nété\n".encode("cp1250"))
    other = write(tmp_path / "other.csv", "text\nhiver œ\n".encode("cp1252"))
    settings = {"validation_source": str(other), "encoding": "cp1252"}
    assert held_out_texts(train, **settings) == ["hiver œ"]
    lines = write(tmp_path / "lines.jsonl", line("b"))
    saved = {"validation_source": str(lines), "delimiter": ";"}
    assert held_out_texts(train, **saved) == ["b"]


def test_the_validation_split_of_another_folder_is_held_out(tmp_path: Path) -> None:
    other = write_files(tmp_path / "other", "train.jsonl", "test.jsonl")
    rows = write(tmp_path / "rows.jsonl", line("a"))
    assert held_out_texts(rows, validation_source=str(other)) == ["test.jsonl"]


def test_a_validation_split_needs_a_single_source(tmp_path: Path) -> None:
    sources = (WeightedSource(source="a.jsonl"), WeightedSource(source="b.jsonl"))
    section = DataSection(sources=sources, validation_split="test")
    with pytest.raises(DataError, match=r"data\.validation_split 'test' needs a single source"):
        load_validation(section, path=None, validation_path=None, cache=tmp_path)


def test_a_hub_data_set_and_docstrings_hold_out_nothing() -> None:
    assert load_held_out("someone/rows") is None
    assert load_held_out("docstrings") is None
