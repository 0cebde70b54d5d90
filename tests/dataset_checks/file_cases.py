"""Every file format, folder and split, prepared completely."""

import json
from typing import Any

import pyarrow

from dataset_checks.expectations import FileCase, learned_pairs
from dataset_checks.written_files import (
    OTHERS,
    PAIRS,
    Writer,
    arrow,
    as_rows,
    as_talks,
    delimited,
    folder_of,
    gzipped,
    json_lines,
    parquet,
    saved,
    saved_splits,
    text,
    zstandard,
)

ROWS = as_rows(PAIRS)
TALKS = as_talks(PAIRS)
LINES = json_lines(ROWS)
HALVES = (json_lines(ROWS[:7]), json_lines(ROWS[7:]))
HELD_OUT = json_lines(as_rows(OTHERS))
ACCENTS = tuple(
    (prompt, f"{answer} Die Möbel für das größere Haus wären schöner, aber teuer.")
    for prompt, answer in PAIRS
)
LINE_BREAKS = tuple((f'He wrote:\n"{prompt}"', f"{answer}\n, ; end") for prompt, answer in PAIRS)
NUMBERS = tuple((f"Box {box}?", f"00{box}") for box in range(14))
DECIMALS = tuple((f"Box {box}?", f"{box}.50") for box in range(14))
TRUTHS = tuple((f"Box {box}?", ("true", "False")[box % 2]) for box in range(14))
DATES = tuple((f"When is box {box} due?", f"2024-01-{box + 1:02}") for box in range(14))
CARD = """---
configs:
- config_name: main
  data_files: main.jsonl
- config_name: other
  data_files: other.jsonl
---
# Boxes
"""
SPLIT_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/part-*.jsonl
  - split: test
    path: held.jsonl
---
"""


def case(
    name: str,
    write: Writer,
    expected: tuple[tuple[str, str], ...] = PAIRS,
    **settings: Any,
) -> FileCase:
    """Return a case whose files have these rows."""
    return FileCase(name, write, learned_pairs(expected), settings=settings)


def held_out(name: str, write: Writer, **settings: Any) -> FileCase:
    """Return a case whose files have rows to hold out."""
    everything = learned_pairs((*PAIRS, *OTHERS))
    return FileCase(name, write, everything, learned_pairs(OTHERS), settings)


def lines(name: str, write: Writer) -> FileCase:
    """Return a case whose files have a text in each line."""
    examples = tuple((f"# {answer}<|im_end|>", f" {answer}<|im_end|>") for _, answer in PAIRS)
    return FileCase(name, write, examples)


def column_lists(pairs: tuple[tuple[str, str], ...]) -> pyarrow.Table:
    """Return a table whose messages are one list per key."""
    values = [{"role": ["user", "assistant"], "content": list(pair)} for pair in pairs]
    return pyarrow.table({"messages": values})


def json_texts() -> list[dict[str, str]]:
    """Return rows whose messages are JSON text."""
    return [{"messages": json.dumps(row["messages"])} for row in TALKS]


JSON = (
    case("file.jsonl", text("file.jsonl", LINES)),
    case("FILE.JSONL", text("FILE.JSONL", LINES)),
    case("file.jsonl, CRLF", text("file.jsonl", json_lines(ROWS, end="\r\n"))),
    case("file.jsonl, blank lines", text("file.jsonl", json_lines(ROWS, end="\n\n"))),
    case("file.jsonl, BOM", text("file.jsonl", LINES, "utf-8-sig")),
    case("file.jsonl, UTF-16", text("file.jsonl", LINES, "utf-16")),
    case("file.jsonl, no last line end", text("file.jsonl", LINES.rstrip("\n"))),
    case("file.jsonl, dates", text("file.jsonl", json_lines(as_rows(DATES))), DATES),
    case(
        "file.jsonl, line separators",
        text("file.jsonl", json_lines(as_rows([(p, f"{c}\u2028\u0085b") for p, c in PAIRS]))),
        tuple((p, f"{c}\u2028\u0085b") for p, c in PAIRS),
    ),
    case(
        "file.jsonl, escapes",
        text("file.jsonl", "".join(json.dumps(row) + "\n" for row in as_rows(ACCENTS))),
        ACCENTS,
    ),
    case(
        "file.jsonl, latin-1 named",
        text("file.jsonl", json_lines(as_rows(ACCENTS)), "latin-1"),
        ACCENTS,
        encoding="latin-1",
    ),
    case("file.json, array", text("file.json", json.dumps(ROWS))),
    case("file.json, indented", text("file.json", json.dumps(ROWS, indent=2))),
    case("file.json, lines", text("file.json", LINES)),
    case("file.json, data", text("file.json", json.dumps({"version": "1", "data": ROWS}))),
    case("file.json, messages", text("file.json", json.dumps(TALKS))),
    held_out(
        "file.json, splits",
        text("file.json", json.dumps({"train": ROWS, "validation": as_rows(OTHERS)})),
    ),
    case(
        "file.jsonl, other keys per row",
        text(
            "file.jsonl",
            json_lines([{**row, f"note {index % 3}": index} for index, row in enumerate(ROWS)]),
        ),
    ),
)
DELIMITED = (
    case("file.csv", text("file.csv", delimited(ROWS))),
    case("file.csv, LF", text("file.csv", delimited(ROWS, end="\n"))),
    case("file.csv, BOM", text("file.csv", delimited(ROWS), "utf-8-sig")),
    case("file.csv, UTF-16", text("file.csv", delimited(ROWS), "utf-16")),
    case("file.csv, latin-1", text("file.csv", delimited(as_rows(ACCENTS)), "latin-1"), ACCENTS),
    case("file.csv, semicolons", text("file.csv", delimited(ROWS, ";"))),
    case("file.csv, tabs", text("file.csv", delimited(ROWS, "\t"))),
    case("file.csv, bars", text("file.csv", delimited(ROWS, "|"))),
    case("file.csv, line breaks", text("file.csv", delimited(as_rows(LINE_BREAKS))), LINE_BREAKS),
    case("file.csv, leading zeros", text("file.csv", delimited(as_rows(NUMBERS))), NUMBERS),
    case("file.csv, decimals", text("file.csv", delimited(as_rows(DECIMALS))), DECIMALS),
    case("file.csv, truth values", text("file.csv", delimited(as_rows(TRUTHS))), TRUTHS),
    case("file.csv, delimiter named", text("file.csv", delimited(ROWS, "^")), delimiter="^"),
    case("file.csv, messages as JSON", text("file.csv", delimited(json_texts()))),
    case("file.tsv", text("file.tsv", delimited(ROWS, "\t"))),
    case(
        "file.tsv, line breaks",
        text("file.tsv", delimited(as_rows(LINE_BREAKS), "\t")),
        LINE_BREAKS,
    ),
)
TEXT_LINES = "".join(f"# {answer}\n" for _, answer in PAIRS)
TEXTS = (
    lines("file.txt", text("file.txt", TEXT_LINES)),
    lines("file.txt, CRLF", text("file.txt", TEXT_LINES.replace("\n", "\r\n"))),
    lines("file.txt, blank lines", text("file.txt", TEXT_LINES.replace("\n", "\n\n"))),
    lines("file.txt, UTF-16", text("file.txt", TEXT_LINES, "utf-16")),
    lines("file.txt.gz", gzipped("file.txt.gz", TEXT_LINES)),
    lines("file.csv, text alone", text("file.csv", "text\n" + TEXT_LINES)),
)
TABLES = (
    case("file.parquet", parquet("file.parquet", ROWS)),
    case("file.parquet, nested", parquet("file.parquet", TALKS)),
    case("file.parquet, JSON text", parquet("file.parquet", json_texts())),
    case("file.parquet, lists per key", parquet("file.parquet", column_lists(PAIRS))),
    case(
        "file.parquet, dictionary",
        parquet(
            "file.parquet",
            pyarrow.table(
                {
                    "prompt": pyarrow.array([p for p, _ in PAIRS]).dictionary_encode(),
                    "completion": pyarrow.array([c for _, c in PAIRS], pyarrow.large_string()),
                }
            ),
        ),
    ),
    case("file.arrow, stream", arrow("file.arrow", ROWS, is_stream=True)),
    case("file.arrow, file", arrow("file.arrow", TALKS, is_stream=False)),
    case("save_to_disk", saved(TALKS)),
    held_out("save_to_disk, splits", saved_splits(train=ROWS, validation=as_rows(OTHERS))),
    case("save_to_disk, part", saved_splits(train=[*ROWS, *as_rows(OTHERS)]), split="train[:14]"),
)
FOLDERS = (
    case("shards", folder_of(text("part-0.jsonl", HALVES[0]), text("part-1.jsonl", HALVES[1]))),
    case(
        "pattern",
        folder_of(
            text("part-0.jsonl", HALVES[0]),
            text("part-1.jsonl", HALVES[1]),
            text("other.jsonl", HELD_OUT),
            pattern="part-*.jsonl",
        ),
    ),
    held_out(
        "train and validation files",
        folder_of(text("train.jsonl", LINES), text("validation.jsonl", HELD_OUT)),
    ),
    held_out(
        "train and test shards",
        folder_of(
            parquet("data/train-00000-of-00002.parquet", ROWS[:7]),
            parquet("data/train-00001-of-00002.parquet", ROWS[7:]),
            parquet("data/test-00000-of-00001.parquet", as_rows(OTHERS)),
        ),
    ),
    held_out(
        "split folders", folder_of(text("train/a.jsonl", LINES), text("dev/a.jsonl", HELD_OUT))
    ),
    case(
        "clone with configurations",
        folder_of(
            text("README.md", CARD), text("main.jsonl", LINES), text("other.jsonl", HELD_OUT)
        ),
        config="main",
    ),
    held_out(
        "clone with splits",
        folder_of(
            text("README.md", SPLIT_CARD),
            text("data/part-0.jsonl", HALVES[0]),
            text("data/part-1.jsonl", HALVES[1]),
            text("held.jsonl", HELD_OUT),
        ),
    ),
    case(
        "folder with a license",
        folder_of(
            text("rows.jsonl", LINES),
            text("README.md", "# Boxes\n"),
            text("LICENSE", "free"),
            text(".gitattributes", "x"),
        ),
    ),
    case("file.jsonl.gz", gzipped("file.jsonl.gz", LINES)),
    case("file.json.gz", gzipped("file.json.gz", json.dumps(ROWS))),
    case("file.csv.gz", gzipped("file.csv.gz", delimited(ROWS))),
    case("file.jsonl.zst", zstandard("file.jsonl.zst", LINES)),
    case("max_rows", text("file.jsonl", LINES + HELD_OUT), max_rows=18, expected=(*PAIRS, *OTHERS)),
    case(
        "bad rows dropped",
        text(
            "file.jsonl",
            LINES + '{"prompt": "", "completion": "x"}\n' + '{"prompt": "x", "completion": null}\n',
        ),
        bad_rows="drop",
    ),
)
CASES = (*JSON, *DELIMITED, *TEXTS, *TABLES, *FOLDERS)
