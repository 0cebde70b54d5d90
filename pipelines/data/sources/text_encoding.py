"""Detect the encoding of a text file, and open it.

A byte order mark or the pattern of zero bytes identifies UTF-16 and UTF-32. Bytes that are valid
UTF-8 are UTF-8. Other bytes are read as cp1252 (a superset of latin-1 text) only if a statistical
detector decodes them to the same text; otherwise the user has to name the encoding, since a wrong
guess would change letters without any error.
"""

import codecs
import io
from typing import IO

from charset_normalizer import from_bytes

from pipelines.data.sources.file_formats import DataFile
from pipelines.errors import DataError

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
UTF_8 = ("utf-8", "utf-8-sig")
WINDOWS_ENCODINGS = [f"cp{number}" for number in range(1250, 1259)]
ISO_ENCODINGS = [f"iso8859_{number}" for number in (1, 2, 5, 7, 9, 15)]
OTHER_ENCODINGS = ["koi8_r", "koi8_u", "mac_roman", "cp437", "cp850", "cp852", "cp866"]
ASIAN_ENCODINGS = ["cp932", "euc_jp", "gb18030", "big5", "euc_kr", "cp949", "cp874"]
LEGACY_ENCODINGS = [*WINDOWS_ENCODINGS, *ISO_ENCODINGS, *OTHER_ENCODINGS, *ASIAN_ENCODINGS]
"""Encodings in which programs save text files; the detector knows many others."""
WESTERN = "cp1252"
HEAD_BYTES = 1 << 12
CHUNK_BYTES = 1 << 20
SAMPLE_BYTES = 1 << 16


def open_text(file: DataFile, encoding: str, newline: str, *, errors: str = "strict") -> IO[str]:
    """Open a file for reading text.

    Args:
        file: may be compressed.
        encoding: as `detect_encoding` or `checked_encoding` returns it.
        newline: "" to split lines at every kind of line end, or the only one.
        errors: as of `open`.
    """
    return io.TextIOWrapper(file.open(), encoding=encoding, newline=newline, errors=errors)


def unicode_encoding(file: DataFile) -> str | None:
    """Return the encoding that the first bytes identify, if they do."""
    with file.open() as stream:
        head = stream.read(HEAD_BYTES)
    for mark, encoding in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding
    even = head[0::2].count(0)
    odd = head[1::2].count(0)
    if max(even, odd) * 4 < len(head):
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def chosen_encoding(file: DataFile, encoding: str | None) -> str:
    """Return the codec for the user's encoding; the detected one if there is none.

    Args:
        file: may be compressed.
        encoding: the user's, if any.

    Raises:
        DataError: the user's encoding does not fit, or the file's cannot be detected.
    """
    return detect_encoding(file) if encoding is None else checked_encoding(file, encoding)


def checked_encoding(file: DataFile, encoding: str) -> str:
    """Return the name of the codec for the user's encoding, which skips a byte order mark.

    Args:
        file: may be compressed.
        encoding: the user's, under any of its names.

    Raises:
        DataError: the encoding is unknown, or the file's byte order mark contradicts it.
    """
    try:
        "a".encode(encoding)  # fails for codecs of other things than text
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise DataError(
            f"data.encoding {encoding!r} is not a known text encoding; use one such as utf-8, "
            "cp1252 or utf-16"
        ) from error
    marked = unicode_encoding(file)
    if marked is None or marked in ("utf-16-le", "utf-16-be"):
        return "utf-8-sig" if name == "utf-8" else name
    if not name.startswith(marked.removesuffix("-sig")):
        raise DataError(
            f"data.encoding {encoding!r} contradicts {str(file.path)!r}, which starts with the "
            f"byte order mark of {marked.removesuffix('-sig')}; remove data.encoding"
        )
    return marked


def detect_encoding(file: DataFile) -> str:
    """Return the encoding of a text file.

    Raises:
        DataError: the encoding is not certain; the message lists candidates.
    """
    found = unicode_encoding(file)
    if found is not None:
        return found
    sample = _sample_of_other_bytes(file)
    if sample is None:
        return "utf-8"
    western = _decoded(sample, WESTERN)
    best = from_bytes(sample, cp_isolation=LEGACY_ENCODINGS).best()
    guessed = best.encoding if best is not None else None
    if guessed is not None and _decoded(sample, guessed) == western:
        return WESTERN
    candidates = [f"{WESTERN} ({_excerpt(western)!r})"]
    if guessed is not None:
        candidates.insert(0, f"{guessed} ({_excerpt(_decoded(sample, guessed))!r})")
    raise DataError(
        f"the encoding of {str(file.path)!r} is not UTF-8 and cannot be detected; it may be "
        f"{' or '.join(candidates)}: set data.encoding, or save the file as UTF-8"
    )


def _sample_of_other_bytes(file: DataFile) -> bytes | None:
    """Return lines with bytes that are not ASCII if the file is not UTF-8, else None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with file.open() as stream:
            while chunk := stream.read(CHUNK_BYTES):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return _lines_with_other_bytes(file)
    return None


def _lines_with_other_bytes(file: DataFile) -> bytes:
    lines = []
    size = 0
    with file.open() as stream:
        for line in stream:
            if not line.isascii():
                lines.append(line)
                size += len(line)
            if size > SAMPLE_BYTES:
                break
    return b"".join(lines)


def _decoded(sample: bytes, encoding: str) -> str:
    return sample.decode(encoding, errors="replace")


def _excerpt(text: str) -> str:
    """Return a few words around the first character that is not ASCII."""
    position = next((at for at, character in enumerate(text) if not character.isascii()), 0)
    return " ".join(text[max(0, position - 20) : position + 20].split())
