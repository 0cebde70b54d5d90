"""Writes are atomic: a failed write leaves the previous file or folder, and nothing else."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.files import (
    atomic_file,
    atomic_folder,
    overlap,
    sha256_of_file,
    write_json,
    write_text,
)


class DiskFullError(OSError):
    """The error of a full disk."""


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every flush to disk fail, as on a full disk."""

    def fail(descriptor: int) -> None:
        raise DiskFullError

    monkeypatch.setattr(os, "fsync", fail)


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in `folder`, including hidden files, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_write_text_replaces_file_and_creates_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "note.txt"
    write_text(path, "first")
    write_text(path, "zweite Fassung – ü\n")
    assert tree(tmp_path) == {"new/deep/note.txt": "zweite Fassung – ü\n".encode()}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.usefixtures("full_disk")
def test_full_disk_keeps_previous_text(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("first", encoding="utf-8")
    with pytest.raises(DiskFullError):
        write_text(path, "second")
    assert tree(tmp_path) == {"note.txt": b"first"}


def test_encoding_error_keeps_previous_text(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a pair: \ud800")
    assert tree(tmp_path) == {"note.txt": b"first"}


def test_open_reader_still_sees_previous_file(tmp_path: Path) -> None:
    """The new text is written to a new file, not over the old one."""
    path = tmp_path / "note.txt"
    write_text(path, "first")
    with path.open(encoding="utf-8") as reader:
        write_text(path, "second")
        assert reader.read() == "first"


def test_equal_json_values_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"b": [1, 2], "a": {"ü": None}})
    write_json(tmp_path / "two.json", {"a": {"ü": None}, "b": [1, 2]})
    content = (tmp_path / "one.json").read_bytes()
    expected = '{\n  "a": {\n    "ü": null\n  },\n  "b": [\n    1,\n    2\n  ]\n}\n'
    assert content == (tmp_path / "two.json").read_bytes()
    assert content == expected.encode()


def test_value_that_is_not_json_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "one.json", {"a": object()})
    assert tree(tmp_path) == {}


def test_folder_appears_when_block_ends(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "result"
    with atomic_folder(folder) as temporary:
        (temporary / "part.txt").write_text("1", encoding="utf-8")
        assert not folder.exists()
    assert tree(tmp_path) == {"parent/result/part.txt": b"1"}
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.fixture
def previous(tmp_path: Path) -> Path:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "old.txt").write_text("old", encoding="utf-8")
    return folder


def test_folder_replaces_previous_folder_completely(tmp_path: Path, previous: Path) -> None:
    with atomic_folder(previous) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "new.txt").write_text("new", encoding="utf-8")
    assert tree(tmp_path) == {"result/sub/new.txt": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failing_block_keeps_previous_folder(
    tmp_path: Path, previous: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), atomic_folder(previous) as temporary:
        (temporary / "new.txt").write_text("new", encoding="utf-8")
        raise error
    assert tree(tmp_path) == {"result/old.txt": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.usefixtures("full_disk")
def test_full_disk_keeps_previous_folder(tmp_path: Path, previous: Path) -> None:
    with pytest.raises(DiskFullError), atomic_folder(previous) as temporary:
        (temporary / "new.txt").write_text("new", encoding="utf-8")
    assert tree(tmp_path) == {"result/old.txt": b"old"}


def test_failing_rename_restores_previous_folder(
    tmp_path: Path, previous: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous folder is renamed first; it is renamed back if the new one cannot replace it."""
    rename = Path.rename
    failures = []

    def fail_once(source: Path, target: Path) -> Path:
        if Path(target) == previous and not failures:
            failures.append(source)
            raise DiskFullError
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(DiskFullError), atomic_folder(previous) as temporary:
        (temporary / "new.txt").write_text("new", encoding="utf-8")
    assert tree(tmp_path) == {"result/old.txt": b"old"}


def test_link_to_folder_is_replaced_without_leftovers(tmp_path: Path, previous: Path) -> None:
    """The target of the link is not touched."""
    link = tmp_path / "latest"
    link.symlink_to(previous)
    with atomic_folder(link) as temporary:
        (temporary / "new.txt").write_text("new", encoding="utf-8")
    assert (link / "new.txt").read_text(encoding="utf-8") == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "result"]


def test_file_replaces_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "adapter.bin"
    for content in ("old", "new"):
        with atomic_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
        assert tree(tmp_path) == {"new/adapter.bin": content.encode()}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failing_block_keeps_previous_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "adapter.bin"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(error), atomic_file(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        raise error
    assert tree(tmp_path) == {"adapter.bin": b"old"}


@pytest.mark.usefixtures("full_disk")
def test_full_disk_keeps_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter.bin"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(DiskFullError), atomic_file(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
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
def test_paths_overlap_if_equal_or_nested(
    tmp_path: Path, one: str, other: str, expected: bool
) -> None:
    assert overlap(tmp_path / one, tmp_path / other) is expected


@given(content=st.binary(max_size=200))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_digest_is_sha256(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(content)
    assert sha256_of_file(path) == hashlib.sha256(content).hexdigest()
