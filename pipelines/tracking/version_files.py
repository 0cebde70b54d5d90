"""The files of a version: their digests are tags on it, and every download is checked.

The card may change with each comparison, so its digest is not recorded.
"""

import hashlib
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion

from lora_core.files import sha256_of_file
from pipelines.tracking.history import ADAPTER_TAG
from pipelines.tracking.model_card import FILE as CARD

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CONFIG_TAG = "config_sha256"
"""Digest of adapter_config.json."""
FILES_TAG = "files_sha256"
"""Digest of the digests of all files but the card."""


def file_tags(folder: Path) -> dict[str, str]:
    """Return the digests of an adapter's files, in addition to that of its weights."""
    tags = {FILES_TAG: _files_digest(folder)}
    if (folder / CONFIG).is_file():
        tags[CONFIG_TAG] = sha256_of_file(folder / CONFIG)
    return tags


def objection(version: ModelVersion, folder: Path) -> str | None:
    """Return how the files differ from those that were registered; None if they are the same.

    A version of an earlier release has no tags for the other files, which are then not checked.
    """
    expected = version.tags.get(ADAPTER_TAG, "")
    weights = folder / WEIGHTS
    if not weights.is_file() or sha256_of_file(weights) != expected:
        shown = expected[:12] or "not set"
        return f"does not contain the adapter of its tag {ADAPTER_TAG} ({shown})"
    recorded = {
        name: version.tags[name] for name in (CONFIG_TAG, FILES_TAG) if name in version.tags
    }
    found = file_tags(folder)
    for name, sha256 in recorded.items():
        if found.get(name) != sha256:
            return f"does not contain the files of its tag {name} ({sha256[:12]})"
    return None


def _files_digest(folder: Path) -> str:
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != CARD:
            lines.append(f"{sha256_of_file(path)}  {name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
