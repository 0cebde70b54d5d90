"""The lock file of a pulled adapter: which version it is, and the digest of each of its files.

    FOLDER/DIGEST/lora.lock.json    next to the adapter's files; DIGEST is that of the weights

A folder whose files match its lock can be used without the registry.
"""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pipelines.config.registry_names import REGISTERED
from pipelines.errors import RegistryError, one_line
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.references import DIGEST
from pipelines.tracking.version_files import digests_in

LOCK = "lora.lock.json"
FOLDER_DIGITS = 16
"""Characters of the digest in a folder's name."""
Format = Literal["peft", "vllm", "llama.cpp"]


class LockedBase(Values):
    """The base that an adapter needs."""

    id: str
    revision: str
    quantization: str
    fingerprints: dict[str, str]
    """Kind of weights → fingerprint."""


class PullLock(Values):
    """The content of a lock file."""

    schema_version: Literal[1] = 1
    name: str
    version: str
    aliases: tuple[str, ...]
    """Of the version when it was pulled."""
    format: Format
    adapter_sha256: str
    """Of the registered weights; an export has others."""
    files_sha256: str = ""
    """Of the other registered files, such as the config with the scale; empty if not known."""
    files: dict[str, str]
    """Path → digest, of every other file in the folder."""
    base: LockedBase
    tracking_uri: str
    time: str
    """When it was pulled, in UTC, ISO 8601."""

    @property
    def registered_digests(self) -> str:
        """The digests of the registered weights and of the other registered files."""
        return joined_digests(self.adapter_sha256, self.files_sha256)

    @property
    def folder_name(self) -> str:
        """Name of the folder."""
        return folder_name(self.adapter_sha256, self.format)


def joined_digests(adapter_sha256: str, files_sha256: str) -> str:
    """Return one text for the digests of the weights and of the other files."""
    return f"{adapter_sha256}:{files_sha256}"


def folder_name(adapter_sha256: str, kind: Format) -> str:
    """Return the name of the folder of an adapter in a format."""
    name = adapter_sha256[:FOLDER_DIGITS]
    return name if kind == "peft" else f"{name}-{kind}"


def read_lock(folder: Path) -> PullLock | None:
    """Return the lock of a folder; None if it has none.

    Raises:
        RegistryError: it cannot be read.
    """
    path = folder / LOCK
    if not path.is_file():
        return None
    try:
        return PullLock.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RegistryError(
            f"{path} is not a lock file of this release ({one_line(error, limit=120)}); delete "
            "its folder, and pull the adapter again"
        ) from error


def write_lock(folder: Path, lock: PullLock) -> None:
    """Write the lock of a folder that has all its other files."""
    (folder / LOCK).write_text(lock.model_dump_json(indent=2) + "\n", encoding="utf-8")


def locked_digests(folder: Path) -> dict[str, str]:
    """Return the digests of the files in a folder, without its lock."""
    digests = digests_in(folder)
    digests.pop(LOCK, None)
    return digests


def check_lock(folder: Path, lock: PullLock) -> None:
    """Raise RegistryError if a file of a pulled folder was changed, removed or added."""
    found = locked_digests(folder)
    for name in sorted(found.keys() | lock.files.keys()):
        if found.get(name) != lock.files.get(name):
            raise RegistryError(
                f"{folder / name} is not the file of {folder / LOCK}: it was changed, added or "
                "removed after it was pulled; do not use it. Delete the folder, and pull it again"
            )


def find_locked(reference: str, folder: Path, kind: Format) -> Path | None:
    """Return the folder of a pulled adapter that a reference identifies without the registry.

    Args:
        reference: NAME/VERSION, or a digest or its first characters; an alias may have moved.
        folder: where adapters are pulled to.
        kind: the format.
    """
    name, slash, version = reference.removeprefix(REGISTERED).partition("/")
    for path in sorted(folder.glob(f"*/{LOCK}")):
        lock = read_lock(path.parent)
        if lock is None or lock.format != kind:
            continue
        is_version = bool(slash) and (lock.name, lock.version) == (name, version)
        is_digest = DIGEST.fullmatch(reference) is not None
        if is_version or (is_digest and lock.adapter_sha256.startswith(reference)):
            return path.parent
    return None
