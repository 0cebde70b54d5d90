"""A file or a folder is complete or absent: a failed write leaves what stood there and nothing else."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.files import (
    file_written_aside,
    folder_written_aside,
    overlap,
    sha256_of_file,
    write_json,
    write_text,
)


class DiskFullError(OSError):
    """What a disk that refuses says."""


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every flush to disk fail, as on a disk that is full."""

    def refuse(descriptor: int) -> None:
        raise DiskFullError

    monkeypatch.setattr(os, "fsync", refuse)


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder`, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_text_replaces_text_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "note.txt"
    write_text(path, "first")
    write_text(path, "zweite Fassung – ü\n")
    assert tree(tmp_path) == {"new/deep/note.txt": "zweite Fassung – ü\n".encode()}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_refuses_keeps_the_former_text(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("first", encoding="utf-8")
    with pytest.raises(DiskFullError):
        write_text(path, "second")
    assert tree(tmp_path) == {"note.txt": b"first"}


def test_text_that_cannot_be_encoded_keeps_the_former_text(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a pair: \ud800")
    assert tree(tmp_path) == {"note.txt": b"first"}


def test_a_reader_of_the_former_file_keeps_reading_it(tmp_path: Path) -> None:
    """The new text goes into a new file: it is not written over the old one."""
    path = tmp_path / "note.txt"
    write_text(path, "first")
    with path.open(encoding="utf-8") as reader:
        write_text(path, "second")
        assert reader.read() == "first"


def test_json_repeats_its_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"b": [1, 2], "a": {"ü": None}})
    write_json(tmp_path / "two.json", {"a": {"ü": None}, "b": [1, 2]})
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert (tmp_path / "one.json").read_text(
        encoding="utf-8"
    ) == '{\n  "a": {\n    "ü": null\n  },\n  "b": [\n    1,\n    2\n  ]\n}\n'


def test_what_is_no_json_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "one.json", {"a": object()})
    assert tree(tmp_path) == {}


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "result"
    with folder_written_aside(folder) as aside:
        (aside / "part.txt").write_text("1", encoding="utf-8")
        assert not folder.exists()
    assert tree(tmp_path) == {"parent/result/part.txt": b"1"}
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.fixture
def former(tmp_path: Path) -> Path:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "old.txt").write_text("old", encoding="utf-8")
    return folder


def test_a_folder_replaces_the_former_one_with_all_its_files(tmp_path: Path, former: Path) -> None:
    with folder_written_aside(former) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "new.txt").write_text("new", encoding="utf-8")
    assert tree(tmp_path) == {"result/sub/new.txt": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_block_keeps_the_former_folder(
    tmp_path: Path, former: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), folder_written_aside(former) as aside:
        (aside / "new.txt").write_text("new", encoding="utf-8")
        raise error
    assert tree(tmp_path) == {"result/old.txt": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_refuses_keeps_the_former_folder(tmp_path: Path, former: Path) -> None:
    with pytest.raises(DiskFullError), folder_written_aside(former) as aside:
        (aside / "new.txt").write_text("new", encoding="utf-8")
    assert tree(tmp_path) == {"result/old.txt": b"old"}


def test_a_failing_rename_puts_the_former_folder_back(
    tmp_path: Path, former: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former folder has stepped aside when the new one cannot take its place: it must step back."""
    rename, refused = Path.rename, []

    def refuse_once(source: Path, target: Path) -> Path:
        if Path(target) == former and not refused:
            refused.append(source)
            raise DiskFullError
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse_once)
    with pytest.raises(DiskFullError), folder_written_aside(former) as aside:
        (aside / "new.txt").write_text("new", encoding="utf-8")
    assert tree(tmp_path) == {"result/old.txt": b"old"}


def test_a_link_to_a_folder_is_replaced_without_litter(tmp_path: Path, former: Path) -> None:
    """What the link pointed to is somebody else's and stays."""
    link = tmp_path / "latest"
    link.symlink_to(former)
    with folder_written_aside(link) as aside:
        (aside / "new.txt").write_text("new", encoding="utf-8")
    assert (link / "new.txt").read_text(encoding="utf-8") == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "result"]


def test_a_file_takes_the_place_of_the_former_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "adapter.bin"
    for content in ("old", "new"):
        with file_written_aside(path) as aside:
            aside.write_text(content, encoding="utf-8")
        assert tree(tmp_path) == {"new/adapter.bin": content.encode()}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_block_keeps_the_former_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "adapter.bin"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(error), file_written_aside(path) as aside:
        aside.write_text("new", encoding="utf-8")
        raise error
    assert tree(tmp_path) == {"adapter.bin": b"old"}


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_refuses_keeps_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter.bin"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(DiskFullError), file_written_aside(path) as aside:
        aside.write_text("new", encoding="utf-8")
    assert tree(tmp_path) == {"adapter.bin": b"old"}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a", "a", True),
        ("a", "a/b", True),
        ("a/b", "a", True),
        ("a", "ab", False),
        ("a/../b", "b", True),
    ],
)
def test_places_overlap_where_one_is_or_holds_the_other(
    tmp_path: Path, one: str, other: str, expected: bool
) -> None:
    assert overlap(tmp_path / one, tmp_path / other) is expected


@given(content=st.binary(max_size=200))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_digest_is_sha256(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(content)
    assert sha256_of_file(path) == hashlib.sha256(content).hexdigest()
