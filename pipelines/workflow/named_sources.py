"""Where the files that a data section names are, and what identifies their content."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_core.files import sha256_of_file
from pipelines.config.data_section import (
    CHATML,
    DOCSTRINGS,
    NO_TEMPLATE,
    DataSection,
    WeightedSource,
)
from pipelines.config.recipe import local_path
from pipelines.data.sources.file_discovery import is_pattern, is_remote, local_files
from pipelines.data.sources.remote_files import remote_identity
from pipelines.paths import find
from pipelines.runtime.stage import digest

BUILT_IN_TEMPLATES = (CHATML, NO_TEMPLATE)


@dataclass(frozen=True)
class NamedSources:
    """The files of a data section."""

    paths: dict[str, str]
    """Name → absolute path or pattern, if it is local."""
    identities: dict[str, str]
    """Name → what changes if the content does."""

    @classmethod
    def of(cls, section: DataSection, search_folders: Sequence[Path]) -> "NamedSources":
        """Find the files of a data section."""
        paths: dict[str, str] = {}
        identities: dict[str, str] = {}
        for source in _sources(section):
            name = source.source
            path = _local_path(name, search_folders)
            if path is not None:
                paths[name] = path
            identities[name] = _identity(source, path)
        return cls(paths, identities)


def _sources(section: DataSection) -> list[WeightedSource]:
    """Return everything that a section reads: sources, validation rows and a chat template."""
    found = list(section.all_sources)
    if section.validation_source is not None:
        found.append(WeightedSource(source=section.validation_source))
    if section.chat_template is not None and section.chat_template not in BUILT_IN_TEMPLATES:
        found.append(WeightedSource(source=section.chat_template))
    return found


def _local_path(name: str, search_folders: Sequence[Path]) -> str | None:
    if is_remote(name) or name == DOCSTRINGS:
        return None
    path = find(name, search_folders)
    if path is None and is_pattern(name):
        return _matching_pattern(name, search_folders)
    return None if path is None else str(path.absolute())


def _matching_pattern(name: str, search_folders: Sequence[Path]) -> str | None:
    """Return the pattern in the first folder in which it matches a file."""
    for folder in search_folders:
        pattern = folder / local_path(name)
        base = Path(pattern.anchor)
        if next(base.glob(str(pattern.relative_to(base))), None) is not None:
            return str(pattern)
    return None


def _identity(source: WeightedSource, path: str | None) -> str:
    if source.source == DOCSTRINGS:
        return sys.version
    if path is not None:
        return _digest_of_files(source, path)
    if is_remote(source.source):
        return remote_identity(source.source)
    return source.source


def _digest_of_files(source: WeightedSource, path: str) -> str:
    root = Path(path)
    if root.is_file():
        return sha256_of_file(root)
    files = local_files(source, path)
    parent = os.path.commonpath([file.parent for file in files])
    return digest([[os.path.relpath(file, parent), sha256_of_file(file)] for file in files])
