"""The files of a version: their digests are tags on it, and every download is checked.

The card and the evidence change with each comparison, and their digests with them. A download that
only needs the adapter does not compare them.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from mlflow.entities.model_registry import ModelVersion

from lora_core.files import sha256_of_file
from pipelines.errors import RegistryError
from pipelines.tracking.model_card import FILE as CARD
from pipelines.tracking.move_log import ADAPTER_TAG

SHA256 = re.compile("[0-9a-f]{64}")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CONFIG_TAG = "config_sha256"
"""Digest of adapter_config.json."""
FILES_TAG = "files_sha256"
"""Digest of the digests of all files but the card and the evidence."""
CARD_TAG = "card_sha256"
"""Digest of the card."""
EVIDENCE_TAG = "evidence_sha256"
"""Digest of the digests of the files in EVIDENCE."""
DOWNLOAD_NOTE = "registered_model_meta"
"""File that MLflow adds to what it downloads; it is not of the version."""
EVIDENCE = "evidence"
"""Folder of a version with what its verdict is computed from."""


def adapter_digest(version: ModelVersion) -> str:
    """Return the digest of a version's weights, which names folders on this host.

    Raises:
        RegistryError: the tag is not a digest.
    """
    sha256 = version.tags.get(ADAPTER_TAG, "")
    if not SHA256.fullmatch(sha256):
        raise RegistryError(
            f"version {version.version} of {version.name} has {sha256[:80]!r} as its tag "
            f"{ADAPTER_TAG}, which is not a digest; use a version that `lora run` registered"
        )
    return sha256


def file_tags(folder: Path, added: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the digests of an adapter's files, in addition to that of its weights.

    Args:
        folder: the files.
        added: name → text of files that are stored with them.
    """
    digests = digests_in(folder)
    for name, text in (added or {}).items():
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    return _tags_of(_in_order(digests))


def objection(tags: Mapping[str, str], folder: Path) -> str | None:
    """Return how the files differ from those that were registered; None if they are the same.

    A version of an earlier release has no tags for the other files, which are then not checked.
    """
    digests = digests_in(folder)
    expected = tags.get(ADAPTER_TAG, "")
    if digests.get(WEIGHTS) != expected:
        shown = expected[:12] or "not set"
        return f"does not contain the adapter of its tag {ADAPTER_TAG} ({shown})"
    recorded = {name: tags[name] for name in (CONFIG_TAG, FILES_TAG) if name in tags}
    found = _tags_of(digests)
    for name, sha256 in recorded.items():
        if found.get(name) != sha256:
            return f"does not contain the files of its tag {name} ({sha256[:12]})"
    return None


def document_objection(tags: Mapping[str, str], folder: Path) -> str | None:
    """Return how card and evidence differ from their tags; None if they are the same.

    A version of an earlier release has no such tags.
    """
    found = document_tags(folder)
    for name in (CARD_TAG, EVIDENCE_TAG):
        recorded = tags.get(name)
        if found.get(name) != recorded and (recorded is not None or name == EVIDENCE_TAG):
            what = CARD if name == CARD_TAG else EVIDENCE
            shown = "not set" if recorded is None else recorded[:12]
            return f"does not contain the {what} of its tag {name} ({shown})"
    return None


def document_tags(folder: Path) -> dict[str, str]:
    """Return the digests of a version's card and evidence, if it has them."""
    tags = {}
    if (folder / CARD).is_file():
        tags[CARD_TAG] = sha256_of_file(folder / CARD)
    if (folder / EVIDENCE).is_dir():
        tags[EVIDENCE_TAG] = digest_of_files(digests_in(folder / EVIDENCE))
    return tags


def digests_in(folder: Path) -> dict[str, str]:
    """Return the digest of each file in a folder by its relative path, in order."""
    digests = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != DOWNLOAD_NOTE:
            digests[name] = sha256_of_file(path)
    return _in_order(digests)


def _in_order(digests: Mapping[str, str]) -> dict[str, str]:
    """Return digests ordered by the parts of their relative paths."""
    return {name: digests[name] for name in sorted(digests, key=PurePosixPath)}


def digest_of_files(digests: Mapping[str, str]) -> str:
    """Return the digest of the digests of files, given by their relative paths in order."""
    lines = [f"{sha256}  {name}\n" for name, sha256 in digests.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tags_of(digests: Mapping[str, str]) -> dict[str, str]:
    """Return the tags for the digests of a version's files, without the weights' own tag."""
    files = {}
    for name, sha256 in digests.items():
        if name != CARD and not name.startswith(f"{EVIDENCE}/"):
            files[name] = sha256
    tags = {FILES_TAG: digest_of_files(files)}
    if CONFIG in digests:
        tags[CONFIG_TAG] = digests[CONFIG]
    return tags
