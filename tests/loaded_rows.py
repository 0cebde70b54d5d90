"""Load a source for a test, and keep only plain values of it."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.config.data_section import DataSection, WeightedSource
from pipelines.data.rows import SourceRows
from pipelines.data.sources.loading_rows import load_source, load_validation
from pipelines.runtime.interfaces.results import SourceFacts

Values = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """The rows of a source."""

    rows: list[Values]
    places: list[str]
    columns: tuple[str, ...]
    facts: SourceFacts

    @classmethod
    def copied(cls, source: SourceRows) -> "Loaded":
        """Copy rows from their file."""
        located = list(source)
        return cls(
            rows=[values for _, values in located],
            places=[place for place, _ in located],
            columns=source.columns,
            facts=source.facts,
        )


def load(source: Path | str, **settings: Any) -> Loaded:
    """Load a source with the given settings."""
    with TemporaryDirectory() as cache:
        named = WeightedSource(source=str(source), **settings)
        return Loaded.copied(load_source(named, cache=Path(cache)))


def load_held_out(source: Path | str, **settings: Any) -> Loaded | None:
    """Load the user's held-out rows of a data section with one source."""
    section = DataSection(source=str(source), **settings)
    with TemporaryDirectory() as cache:
        rows = load_validation(section, path=None, validation_path=None, cache=Path(cache))
        return None if rows is None else Loaded.copied(rows)


def write(path: Path, content: str | bytes) -> Path:
    """Write a file as it is given, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(data)
    return path


def line(text: str) -> str:
    """Return a JSON line with a text."""
    return f'{{"text": "{text}"}}\n'


def texts(source: Path | str, **settings: str | None) -> list[str]:
    """Return the texts of a source."""
    return [row["text"] for row in load(source, **settings).rows]


def held_out_texts(source: Path | str, **settings: str | None) -> list[str] | None:
    """Return the texts of the held-out rows."""
    loaded = load_held_out(source, **settings)
    return None if loaded is None else [row["text"] for row in loaded.rows]


def write_files(folder: Path, *names: str) -> Path:
    """Write files whose only row is their own name."""
    for name in names:
        write(folder / name, line(name))
    return folder
