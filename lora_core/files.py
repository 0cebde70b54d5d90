"""Atomic writes: a file is written under a temporary name, flushed to disk, then renamed."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one, never a partial one.

    Args:
        path: created or replaced, with its parent folders.
        text: written in UTF-8.

    Raises:
        OSError: the write failed; a previous file at `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes.

    Args:
        path: created or replaced, as by `write_text`.
        value: what JSON can represent.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    write_text(path, f"{text}\n")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `folder` when the block succeeds.

    On an exception the temporary folder is removed and `folder` is unchanged.

    Args:
        folder: created or replaced, with its parent folders.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                _flush(path)
        temporary.chmod(0o755)
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path for the block to write; it replaces `path` when the block succeeds.

    On an exception the temporary file is removed and `path` is unchanged.

    Args:
        path: created or replaced, with its parent folders.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def overlap(one: Path, other: Path) -> bool:
    """Return whether two paths are the same, or one is inside the other."""
    one = one.resolve()
    other = other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of the file's bytes in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; an existing `folder` is moved away first and then removed."""
    previous = temporary.with_name(f"{temporary.name}.former")
    existed = folder.exists()
    if existed:
        folder.rename(previous)
    try:
        temporary.rename(folder)
    except BaseException:
        if existed:
            previous.rename(folder)
        raise
    if previous.is_dir() and not previous.is_symlink():
        shutil.rmtree(previous, ignore_errors=True)
    else:
        previous.unlink(missing_ok=True)
