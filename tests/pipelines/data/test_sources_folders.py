"""Folders, patterns, compressed files and clones of hub data sets are read."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from loaded_rows import held_out_texts, line, load, texts, write, write_files

from pipelines.config.data_section import WeightedSource
from pipelines.data.sources.file_discovery import is_pattern, is_remote, local_files
from pipelines.errors import DataError


def zstandard(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
    ".GZ": gzip.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json"])
def test_compressed_files_are_read(tmp_path: Path, name: str, suffix: str) -> None:
    contents = {
        "rows.jsonl": line("one") + line("two"),
        "rows.csv": "text\none\ntwo\n",
        "rows.json": f"[{line('one')}, {line('two')}]",
    }
    path = write(tmp_path / f"{name}{suffix}", COMPRESSED[suffix](contents[name].encode()))
    assert texts(path) == ["one", "two"]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    content = "".join(line(str(number)) for number in range(2000)).encode()
    compressed = COMPRESSED[suffix](content)
    path = write(tmp_path / f"rows.jsonl{suffix}", compressed[: len(compressed) // 2])
    with pytest.raises(DataError, match=r"rows\.jsonl.* cannot be read as json lines"):
        load(path)


def test_a_compressed_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet.gz", gzip.compress(b"PAR1"))
    with pytest.raises(DataError, match=r"compressed parquet file.*decompress it"):
        load(path)


def test_shards_follow_each_other_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_files(tmp_path, "part-00001.jsonl", "part-00000.jsonl", "more/part-00002.jsonl")
    loaded = load(tmp_path)
    assert [row["text"] for row in loaded.rows] == [
        "more/part-00002.jsonl",
        "part-00000.jsonl",
        "part-00001.jsonl",
    ]
    assert loaded.places[0] == "line 1 of 'more/part-00002.jsonl'"
    assert loaded.facts.files == 3
    assert held_out_texts(tmp_path) is None


def test_files_that_describe_the_data_are_ignored(tmp_path: Path) -> None:
    write_files(tmp_path, "rows.jsonl")
    described = ["README", "README.md", "LICENSE.txt", "dataset_infos.json", ".gitattributes"]
    for name in [*described, ".git/config", "_SUCCESS", ".cache/rows.jsonl"]:
        write(tmp_path / name, "not rows")
    assert texts(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("names", "fragments"),
    [
        (["a.jsonl", "b.csv"], ["different formats (a.jsonl, b.csv)"]),
        (["a.jsonl", "b.xlsx"], ["b.xlsx", "use a file that ends in"]),
        (["train.jsonl", "extra.jsonl"], ["train.jsonl", "others (extra.jsonl)"]),
        (["a.jsonl", "a.jsonl.gz"], ["a.jsonl.gz' and 'a.jsonl' are the same file"]),
        (["notes"], ["notes", "cannot be read as rows"]),
        (["README.md"], ["has no data file"]),
    ],
)
def test_an_unclear_folder_is_refused(
    tmp_path: Path, names: list[str], fragments: list[str]
) -> None:
    write_files(tmp_path, *names)
    with pytest.raises(DataError) as refused:
        load(tmp_path)
    for fragment in [str(tmp_path), *fragments]:
        assert fragment in str(refused.value)


def test_an_empty_shard_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jsonl", "b.jsonl")
    write(tmp_path / "b.jsonl", "")
    with pytest.raises(DataError, match=r"b\.jsonl' is empty"):
        load(tmp_path)


def test_a_linked_folder_is_read(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", "a.jsonl")
    folder = write_files(tmp_path / "rows[1]", "b.jsonl")
    (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert texts(folder) == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("data/*.jsonl", ["data/a.jsonl", "data/b.jsonl"]),
        ("**/*.jsonl", ["data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl"]),
        ("data/**", ["data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl"]),
        ("data/[ab].jsonl", ["data/a.jsonl", "data/b.jsonl"]),
        ("data/?.jsonl", ["data/a.jsonl", "data/b.jsonl"]),
    ],
)
def test_a_pattern_matches_files_in_order(
    tmp_path: Path, pattern: str, expected: list[str]
) -> None:
    write_files(tmp_path, "data/b.jsonl", "data/a.jsonl", "data/deep/c.jsonl", "x.csv")
    assert texts(tmp_path / pattern) == expected
    files = local_files(WeightedSource(source="x"), str(tmp_path / pattern))
    assert files == [tmp_path / name for name in expected]


def test_a_pattern_without_matches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file matches the pattern .*\*\.jsonl"):
        load(tmp_path / "*.jsonl")


def test_a_name_with_brackets_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows[1].jsonl"
    write_files(tmp_path, path.name)
    assert texts(path) == [path.name]
    assert not is_pattern(str(path))


def test_a_split_of_a_folder_can_be_named(tmp_path: Path) -> None:
    write_files(tmp_path, "train.jsonl", "test.jsonl")
    assert texts(tmp_path, split="test") == ["test.jsonl"]
    with pytest.raises(DataError, match=r"'dev' is not a split of .* has test, train"):
        load(tmp_path, split="dev")
    with pytest.raises(DataError, match=r"data\.max_rows"):
        load(tmp_path, split="train[:5]")


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*.jsonl
  - split: test
    path: [main/test.jsonl]
- config_name: other
  data_files: other.jsonl
- config_name: folder
  data_dir: sub
---
# Boxes
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of a hub data set with three configurations."""
    names = ["main/train-0.jsonl", "main/train-1.jsonl", "main/test.jsonl", "other.jsonl"]
    write_files(tmp_path, *names, "sub/train.jsonl", "sub/test.jsonl", "loader.py")
    write(tmp_path / "README.md", CARD)
    return tmp_path


def test_a_configuration_of_a_clone_is_read(clone: Path) -> None:
    assert texts(clone, config="main") == ["main/train-0.jsonl", "main/train-1.jsonl"]
    assert held_out_texts(clone, config="main") == ["main/test.jsonl"]
    assert texts(clone, config="other") == ["other.jsonl"]
    assert texts(clone, config="folder") == ["sub/train.jsonl"]
    assert held_out_texts(clone, config="folder") == ["sub/test.jsonl"]
    assert clone / "README.md" in local_files(
        WeightedSource(source="x", config="other"), str(clone)
    )


def test_a_configuration_has_to_be_named(clone: Path) -> None:
    with pytest.raises(DataError, match=r"folder, main, other; name one as data\.config"):
        load(clone)
    with pytest.raises(DataError, match=r"'x' is not a configuration.*folder, main, other"):
        load(clone, config="x")


def test_the_default_configuration_is_read(clone: Path) -> None:
    write(clone / "README.md", CARD.replace("name: other", "name: other\n  default: true"))
    assert texts(clone) == ["other.jsonl"]


def test_a_missing_file_of_a_configuration_is_named(clone: Path) -> None:
    (clone / "other.jsonl").unlink()
    with pytest.raises(DataError, match=r"no file matches 'other\.jsonl'.*complete the folder"):
        load(clone, config="other")


def test_a_malformed_card_is_refused(clone: Path) -> None:
    write(clone / "README.md", "---\nconfigs: [\n---\n")
    with pytest.raises(DataError, match=r"README\.md' does not describe its configurations"):
        load(clone)


def test_a_configuration_without_a_card_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "rows.jsonl")
    with pytest.raises(DataError, match=r"data\.config 'main' has no effect"):
        load(tmp_path, config="main")


@pytest.mark.parametrize(
    ("source", "expected"),
    [("s3://a/b.jsonl", True), ("HTTPS://a/b", True), ("a/b", False), ("C:/rows.csv", False)],
)
def test_addresses_are_recognized(source: str, expected: bool) -> None:
    assert is_remote(source) is expected
