"""Files that are complete or absent: written aside, flushed to disk, then renamed into place."""

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
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the disk refused; whatever stood at `path` is untouched.
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
    """Write `value` as JSON with sorted keys, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that takes the place of `folder` when the block succeeds.

    On an exception the sibling is removed and `folder` stays as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield aside
        for path in sorted(p for p in aside.rglob("*") if p.is_file()):
            _flush(path)
        aside.chmod(0o755)
        _replace_folder(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def file_written_aside(path: Path) -> Iterator[Path]:
    """Yield the path of a sibling that takes the place of `path` when the block, which writes it, succeeds.

    On an exception the sibling is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    aside = Path(name)
    try:
        yield aside
        _flush(aside)
        aside.chmod(0o644)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def overlap(one: Path, other: Path) -> bool:
    """Tell whether the two are one place, or one lies inside the other."""
    one, other = one.resolve(), other.resolve()
    return one == other or one in other.parents or other in one.parents


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of the file's bytes in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`; a former `folder` steps out of the way first and is then removed."""
    former = aside.with_name(f"{aside.name}.former")
    stood = folder.exists()
    if stood:
        folder.rename(former)
    try:
        aside.rename(folder)
    except BaseException:
        if stood:
            former.rename(folder)
        raise
    if former.is_dir() and not former.is_symlink():
        shutil.rmtree(former, ignore_errors=True)
    else:
        former.unlink(missing_ok=True)
