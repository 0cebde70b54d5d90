"""Files of generated rows of about 120 tokens, in schemas that the pipeline and TRL both read."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Kind = Literal["conversations", "pairs"]
KINDS: tuple[Kind, ...] = ("conversations", "pairs")
WORDS = (
    "the a box lid color gray red green large small open closed which what where is was of in on "
    "with under table room house and or not very old new first last number value list name order "
    "before after every some find take give put read write count return function item key"
)
WORDS_PER_TURN = {"conversations": 20, "pairs": 45}
"""With the tokens of the template, both kinds have about 120 tokens per row."""


def write_generated(file: Path, kind: Kind, rows: int) -> None:
    """Write rows as JSON lines; the same arguments give the same file."""
    with file.open("w", encoding="utf-8") as stream:
        for row in _rows(kind, rows):
            stream.write(json.dumps(row) + "\n")


def _rows(kind: Kind, rows: int) -> Iterator[dict[str, Any]]:
    source = random.Random(7)
    for number in range(rows):
        texts = [_text(source, WORDS_PER_TURN[kind]) for _ in range(4)]
        texts[0] = f"Question {number}: {texts[0]}"
        roles = ("user", "assistant") * 2
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        if kind == "conversations":
            yield {"messages": turns}
        else:
            yield {"prompt": turns[:1], "completion": turns[1:2]}


def _text(source: random.Random, words: int) -> str:
    return " ".join(source.choices(WORDS.split(), k=words)).capitalize() + "."
