"""Files and settings that must be refused, with words that the message must have."""

import datetime
import json
from typing import Any

import pyarrow

from dataset_checks.expectations import FileCase, refused
from dataset_checks.file_cases import CARD, HELD_OUT, LINES, ROWS, TALKS
from dataset_checks.written_files import (
    PAIRS,
    Writer,
    as_rows,
    data,
    delimited,
    folder_of,
    gzipped,
    json_lines,
    parquet,
    saved_splits,
    text,
)

PROMPTS = [prompt for prompt, _ in PAIRS]


def case(name: str, write: Writer, *words: str, **settings: Any) -> FileCase:
    """Return a case that must be refused."""
    return FileCase(name, write, refused(*words), settings=settings)


def late(name: str, columns: dict[str, Any], *words: str) -> FileCase:
    """Return a case whose last row has columns that no other has, after those that are sampled."""
    rows = as_rows((f"Box {box}?", "Gray.") for box in range(150))
    row = {"prompt": "a", "completion": "b", **columns}
    return case(f"late {name}", text("file.jsonl", json_lines([*rows, row])), *words)


def table(kind: str, completions: list[Any]) -> Writer:
    """Return a writer of a Parquet file with unusual completions."""
    return parquet(f"{kind}.parquet", pyarrow.table({"prompt": PROMPTS, "completion": completions}))


CONTENT = (
    case("empty file", text("file.jsonl", ""), "empty"),
    case("blank file", text("file.jsonl", "\n\n"), "no rows"),
    case("empty array", text("file.json", "[]"), "no rows"),
    case("header alone", text("file.csv", "prompt,completion\n"), "no rows"),
    case("broken line", text("file.jsonl", LINES + '{"prompt": \n'), "line 15", "JSON"),
    case("list as a line", text("file.jsonl", LINES + '["a"]\n'), "line 15"),
    case(
        "repeated key",
        text("file.jsonl", LINES + '{"prompt": "a", "prompt": "b", "completion": "c"}\n'),
        "line 15",
        "'prompt'",
    ),
    case("NaN", text("file.jsonl", LINES + '{"prompt": "a", "completion": NaN}\n'), "NaN"),
    case(
        "lone surrogate in a file",
        text("file.jsonl", LINES + '{"prompt": "a", "completion": "\\ud800"}\n'),
        "line 15",
        "surrogate",
    ),
    case(
        "bytes that are not UTF-8",
        data("file.jsonl", LINES.encode() + b'{"prompt": "\xe9", "completion": "b"}\n'),
        "line 15",
        "UTF-8",
    ),
    case("half a document", text("file.json", json.dumps(ROWS)[:-20]), "file.json"),
    case("document without rows", text("file.json", '{"version": 1}'), "list"),
    case("open quote", text("file.csv", delimited(ROWS) + '"a,b\n'), "line 16"),
    case("too many cells", text("file.csv", delimited(ROWS) + "a,b,c\r\n"), "line 16", "3 cells"),
    case("repeated column", text("file.csv", "prompt,prompt\r\na,b\r\n"), "prompt"),
    case("column without a name", text("file.csv", ",prompt,completion\r\nx,a,b\r\n"), "no name"),
    case("broken parquet", data("file.parquet", b"PAR1 and no more"), "parquet"),
    case("broken gzip", data("file.jsonl.gz", b"\x1f\x8b and no more"), "file.jsonl.gz"),
    case("parquet that is JSON", text("file.parquet", LINES), "parquet"),
    case("numbers in parquet", table("numbers", list(range(14))), "completion", "text"),
    case(
        "dates in parquet", table("dates", [datetime.date(2024, 1, 1)] * 14), "completion", "date32"
    ),
    case(
        "times in parquet",
        table("times", [datetime.datetime(2024, 1, 1)] * 14),
        "completion",
        "timestamp",
    ),
    case("bytes in parquet", table("bytes", [b"gray"] * 14), "completion", "binary"),
    late("label", {"label": False}, "label"),
    late("images", {"images": ["box.png"]}, "images"),
    late("rejected answer", {"rejected": "b"}, "rejected"),
    late("messages", {"messages": []}, "messages", "data.columns"),
    case(
        "shards with other columns",
        folder_of(text("part-0.jsonl", LINES), text("part-1.jsonl", json_lines(TALKS))),
        "messages",
        "data.columns",
    ),
    case(
        "bad rows",
        text(
            "file.jsonl",
            LINES + '{"prompt": "", "completion": "x"}\n{"prompt": "x", "completion": null}\n',
        ),
        "2 rows",
        "line 15",
        "line 16",
    ),
)
PLACES = (
    case("absent file", lambda folder: folder / "absent.jsonl", "does not exist", "absent.jsonl"),
    case("unknown suffix", text("file.xlsx", "x"), "file.xlsx", ".jsonl"),
    case("pattern without files", lambda folder: f"{folder}/*.jsonl", "no data file"),
    case("empty folder", lambda folder: folder, "no data file"),
    case("copies", folder_of(text("a.jsonl", LINES), gzipped("a.jsonl.gz", LINES)), "a.jsonl.gz"),
    case(
        "different formats",
        folder_of(text("a.jsonl", LINES), text("b.csv", delimited(ROWS))),
        "a.jsonl",
        "b.csv",
    ),
    case(
        "unnamed configuration",
        folder_of(
            text("README.md", CARD), text("main.jsonl", LINES), text("other.jsonl", HELD_OUT)
        ),
        "main",
        "other",
        "data.config",
    ),
    case(
        "unknown configuration",
        folder_of(
            text("README.md", CARD), text("main.jsonl", LINES), text("other.jsonl", HELD_OUT)
        ),
        "third",
        config="third",
    ),
    case("split of a file", text("file.jsonl", LINES), "split", split="train[:20]"),
    case(
        "unknown split",
        saved_splits(train=ROWS, test=ROWS),
        "validation",
        "train",
        "test",
        split="validation",
    ),
    case("revision of a file", text("file.jsonl", LINES), "revision", revision="abc"),
    case("configuration of a file", text("file.jsonl", LINES), "config", config="main"),
    case("encoding of parquet", parquet("file.parquet", ROWS), "encoding", encoding="latin-1"),
    case("delimiter of JSON", text("file.jsonl", LINES), "delimiter", delimiter=";"),
    case("unknown encoding", text("file.jsonl", LINES), "latin-99", encoding="latin-99"),
)
SPLITS = (
    case("one row", text("file.jsonl", json.dumps(ROWS[0]) + "\n"), "too few"),
    case("two rows", text("file.jsonl", LINES[: LINES.index("\n", 100) + 1]), "too few"),
    case(
        "one prompt",
        text("file.csv", delimited(as_rows([("Write.", c) for _, c in PAIRS]))),
        "group",
    ),
    case(
        "long examples",
        text("file.jsonl", LINES),
        "max_tokens",
        max_tokens=16,
        long_examples="error",
    ),
    case("nothing fits", text("file.jsonl", LINES), "max_tokens", max_tokens=8),
    case(
        "source and sources",
        text("file.jsonl", LINES),
        "sources",
        sources=[{"source": "other.jsonl"}],
    ),
    case(
        "characters of a file",
        text("file.jsonl", LINES),
        "max_source_characters",
        max_source_characters=300,
    ),
)
CASES = (*CONTENT, *PLACES, *SPLITS)
