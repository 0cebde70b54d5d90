"""Download data files from an address, such as s3://bucket/rows.jsonl, through fsspec."""

import glob
import re
from hashlib import sha256
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from pipelines.errors import DataError, one_line

VERSION_KEYS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "size")
"""What file systems report about the content of a file."""


def download(address: str, cache: Path) -> str:
    """Download a file, or all files of a folder or a pattern, unless the cache has them.

    Args:
        address: such as https://example.org/rows.jsonl.
        cache: a folder that is used by one preparation only.

    Returns:
        The path of the file or the folder, or a pattern, on this machine.

    Raises:
        DataError: a package is missing, or the address cannot be read.
    """
    digest = sha256(address.encode()).hexdigest()
    target = cache / f"download-{digest[:16]}"
    try:
        system, root, paths = _list_files(address)
        if not target.exists():
            partial = Path(mkdtemp(dir=cache))
            for path in paths:
                local = partial / _relative(path, root)
                local.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(path, str(local))
            partial.rename(target)
    except Exception as error:
        raise _unreadable(address, error) from error
    if not paths:
        raise DataError(f"no file matches {address!r}; check the address")
    if root is None:
        return str(target / _relative(paths[0], root))
    if glob.has_magic(address):
        return str(target / "**" / "*")
    return str(target)


def remote_identity(address: str) -> str:
    """Return the address with the versions of its files, as far as the server reports them.

    Raises:
        DataError: a package is missing, or the address cannot be read.
    """
    try:
        system, _, paths = _list_files(address)
        facts = [_version(system.info(path)) for path in paths]
    except Exception as error:
        raise _unreadable(address, error) from error
    return "\n".join([address, *facts])


def _list_files(address: str) -> tuple[Any, str | None, list[str]]:
    """Return the file system, the folder of several files, and the files."""
    system, path = fsspec.core.url_to_fs(address)
    is_web = urlsplit(address).scheme.lower() in ("http", "https")
    if is_web:  # a question mark separates the query
        return system, None, [path]
    if glob.has_magic(path):
        before_pattern = re.split(r"[*?\[]", path, maxsplit=1)[0]
        root, _, _ = before_pattern.rpartition("/")
        return system, root, sorted(system.glob(path))
    if system.isdir(path):
        return system, path, sorted(system.find(path))
    return system, None, [path]


def _relative(path: str, root: str | None) -> PurePosixPath:
    """Return the path below the root, or the file's name; that of a web page has no query."""
    if root is not None:
        below_root = path.removeprefix(root).lstrip("/")
        return PurePosixPath(below_root)
    plain = path
    if "://" in path:
        plain = unquote(urlsplit(path).path)
    name = PurePosixPath(plain).name
    return PurePosixPath(name)


def _version(info: dict[str, Any]) -> str:
    known = [f"{key}={info[key]}" for key in VERSION_KEYS if info.get(key) is not None]
    return " ".join([str(info.get("name")), *known])


def _unreadable(address: str, error: Exception) -> DataError:
    fix = "check the address and your permission to read it"
    if isinstance(error, ImportError):
        fix = "install the package that the message names"
    return DataError(f"data source {address!r} cannot be read: {one_line(error)}; {fix}")
