"""Formats and compressions of data files, by the end of their names. Imports no torch."""

import bz2
import gzip
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

FORMATS = {
    ".jsonl": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text lines",
    ".ndjson": "json lines",
}
"""Suffix, in any case → format."""
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
TEXT_FORMATS = frozenset({"json lines", "json", "csv", "tsv", "text lines"})
"""Formats with an encoding; only these can be compressed."""
DELIMITED_FORMATS = frozenset({"csv", "tsv"})
KNOWN_SUFFIXES = ", ".join(FORMATS)


@dataclass(frozen=True)
class DataFile:
    """A file with rows."""

    path: Path
    name: str
    """In the places of its rows, such as `part-00001.jsonl`."""

    @property
    def format(self) -> str | None:
        """The format that the suffix names; None if it is not known."""
        return format_of(self.path)

    def open(self) -> IO[bytes]:
        """Open the file for reading and decompress it."""
        compression = compression_of(self.path)
        if compression == ".gz":
            return cast(IO[bytes], gzip.open(self.path))
        if compression == ".bz2":
            return cast(IO[bytes], bz2.open(self.path))
        if compression == ".xz":
            return cast(IO[bytes], lzma.open(self.path))
        if compression == ".zst":
            return _open_zstandard(self.path)
        return self.path.open("rb")


def format_of(path: Path) -> str | None:
    """Return the format that the suffix names, without that of a compression."""
    suffix = Path(uncompressed_name(path)).suffix.lower()
    return FORMATS.get(suffix)


def compression_of(path: Path) -> str | None:
    """Return the suffix of the compression, in lower case; None if there is none."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def uncompressed_name(path: Path) -> str:
    """Return the file's name without the suffix of a compression."""
    return path.name if compression_of(path) is None else path.stem


def _open_zstandard(path: Path) -> IO[bytes]:
    import io

    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream)
