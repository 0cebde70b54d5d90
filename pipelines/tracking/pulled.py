"""Get a registered adapter: a verified folder with a lock file, usable without the registry."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion

from lora_core.base.identity import FolderSource, is_recorded
from lora_core.base.weight_files import CONFIG, read_object
from lora_core.files import atomic_folder
from pipelines.config.alias_names import CHAMPION
from pipelines.errors import RegistryError, without_credentials
from pipelines.paths import tracking_uri
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.connection import connect, reading
from pipelines.tracking.lineage import lineage_of
from pipelines.tracking.pull_lock import (
    Format,
    LockedBase,
    PullLock,
    check_lock,
    find_locked,
    folder_name,
    joined_digests,
    locked_digests,
    read_lock,
    write_lock,
)
from pipelines.tracking.references import Reference, aliases_of
from pipelines.tracking.registry import download_version
from pipelines.tracking.tag_names import tags_of
from pipelines.tracking.version_files import FILES_TAG, adapter_digest, document_objection

FindBase = Callable[[LockedBase], Path | None]
"""Returns the folder of a base on this host; None if it is not here."""
GGUF_FILE = "adapter.gguf"


@dataclass(frozen=True)
class PullRequest:
    """What to get, and where to."""

    reference: str
    """NAME, NAME@ALIAS, NAME/VERSION, or the digest of an adapter that was pulled before."""
    folder: Path
    """Gets a folder named after the digest."""
    format: Format
    find_base: FindBase


class PulledAdapter(Values):
    """An adapter on this host."""

    folder: str
    lock: PullLock
    reused: bool
    """It was pulled before, and its files were verified again."""
    base: str
    """Folder of the base, whose fingerprint was verified; empty if it is not on this host."""


def pull(request: PullRequest, runs: Path) -> PulledAdapter:
    """Return a verified folder of an adapter; download it unless it was pulled before.

    The registry is needed for an alias, and for what was not pulled before.

    Raises:
        RegistryError: there is no such version, a file was changed, or the base on this host is
            another one.
        LoraError: the format cannot express the adapter.
    """
    known = find_locked(request.reference, request.folder, request.format)
    if known is not None:
        return _reused(known, request)
    reference = Reference.parse(request.reference, default_alias=CHAMPION)
    with connect(runs, reading(reference.name)) as client:
        version = reference.resolve(client)
        lock = _new_lock(version, request.format, aliases_of(client, reference.name), runs)
        folder = request.folder / lock.folder_name
        earlier = read_lock(folder)
        if earlier is not None and earlier.registered_digests == lock.registered_digests:
            return _reused(folder, request)
        with tempfile.TemporaryDirectory() as scratch:
            source = download_version(version, Path(scratch))
            _check_documents(version, source)
            base = _verified_base(lock.base, request.find_base)
            with atomic_folder(folder) as aside:
                _write_format(source, aside, request.format, base)
                lock = lock.model_copy(update={"files": locked_digests(aside)})
                write_lock(aside, lock)
    return PulledAdapter(folder=str(folder), lock=lock, reused=False, base=str(base or ""))


def registered_digests(version: ModelVersion) -> str:
    """Return the digests of a version as `PullLock.registered_digests` has them."""
    return joined_digests(adapter_digest(version), tags_of(version).get(FILES_TAG, ""))


def _reused(folder: Path, request: PullRequest) -> PulledAdapter:
    """Verify a folder that was pulled before."""
    lock = read_lock(folder)
    assert lock is not None, "the folder was found by its lock"
    check_lock(folder, lock)
    if folder.name != folder_name(lock.adapter_sha256, lock.format):
        raise RegistryError(
            f"{folder} is not named after the digest in its lock, {lock.folder_name}; rename it, "
            "or delete it and pull the adapter again"
        )
    base = _verified_base(lock.base, request.find_base)
    return PulledAdapter(folder=str(folder), lock=lock, reused=True, base=str(base or ""))


def _new_lock(version: ModelVersion, kind: Format, aliases: dict[str, str], runs: Path) -> PullLock:
    """Return the lock of a version, without its files."""
    number = str(version.version)
    sha256 = adapter_digest(version)
    lineage = lineage_of(version)
    base = LockedBase(
        id=lineage.base,
        revision=lineage.base_revision,
        quantization=lineage.quantization,
        fingerprints=lineage.base_fingerprints,
    )
    return PullLock(
        name=version.name,
        version=number,
        aliases=tuple(sorted(alias for alias, held in aliases.items() if held == number)),
        format=kind,
        adapter_sha256=sha256,
        files_sha256=tags_of(version).get(FILES_TAG, ""),
        files={},
        base=base,
        tracking_uri=without_credentials(tracking_uri(runs)),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _check_documents(version: ModelVersion, folder: Path) -> None:
    problem = document_objection(tags_of(version), folder)
    if problem is not None:
        raise RegistryError(
            f"version {version.version} of {version.name} {problem}: it was changed after it was "
            "registered, or a run is registering it now; pull it again"
        )


def _verified_base(base: LockedBase, find_base: FindBase) -> Path | None:
    """Return the folder of the base on this host; None if it is not here.

    Raises:
        RegistryError: it is another base than the one that the adapter was trained on.
    """
    folder = find_base(base)
    if folder is None or not base.fingerprints:
        return folder
    if not is_recorded(FolderSource(folder), base.fingerprints):
        raise RegistryError(
            f"{folder} is the base {base.id!r} on this host, but its weights are not those that "
            "the adapter was trained on; get that base again, or remove the folder"
        )
    return folder


def _write_format(source: Path, folder: Path, kind: Format, base: Path | None) -> None:
    """Write an adapter's files in a format into an empty folder."""
    if kind == "peft":
        _copy(source, folder)
    elif kind == "vllm":
        from lora_core.export.export import VLLM_RANKS, export_vllm

        export_vllm(source, folder, max_rank=VLLM_RANKS[-1])
    else:
        _write_gguf(source, folder / GGUF_FILE, base)


def _write_gguf(source: Path, file: Path, base: Path | None) -> None:
    from lora_core.export.export import export_gguf
    from lora_core.export.gguf import GGUF_MODELS

    if base is None:
        raise RegistryError(
            "the export for llama.cpp needs the base's config.json, and the base is not on this "
            "host; name its folder with --base"
        )
    model_type = read_object(base / CONFIG).get("model_type")
    architecture = str(model_type)  # one that is not supported is refused by the export
    for name, types in GGUF_MODELS.items():
        if model_type in types:
            architecture = name
    export_gguf(source, file, base_config=base, architecture=architecture)


def _copy(source: Path, folder: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
