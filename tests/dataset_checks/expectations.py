"""A case: rows, how the recipe reads them, and what must come out."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Turn = tuple[str, str]
"""Role and content."""
LearnedText = tuple[str, str]
"""An example and its supervised text."""


@dataclass(frozen=True)
class Learned:
    """One example that must come out, decoded."""

    text: str
    """All tokens of the example."""
    spans: tuple[str, ...]
    """Each run of supervised tokens."""
    reference: str
    """The answer that generations are compared with."""


@dataclass(frozen=True)
class Refused:
    """The case must be refused."""

    words: tuple[str, ...]
    """Each must be in the message: the value, the rule or the fix."""


@dataclass(frozen=True)
class RowCase:
    """Rows in memory."""

    name: str
    rows: tuple[Row, ...]
    expected: tuple[Learned, ...] | Refused
    base: str = "chatml"
    """A tokenizer and its template; see `bases`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the data section, in addition to the defaults."""
    notes: tuple[str, ...] = ()
    """Observations that must be made, and no others."""
    groups: int | None = None
    """Number of groups in which the rows must be; None if it is not checked."""
    differs_from_trl: str = ""
    """Why the tokens of TRL are not a reference."""


@dataclass(frozen=True)
class FileCase:
    """Files that are prepared completely."""

    name: str
    write: Callable[[Path], Path | str]
    """Writes the files into an empty folder and returns the source."""
    expected: tuple[LearnedText, ...] | Refused
    """Every example, in any order."""
    validation: tuple[LearnedText, ...] | None = None
    """Those that must be held out; None if the seed draws them."""
    settings: Mapping[str, Any] = field(default_factory=dict)


def chatml(*turns: Turn) -> str:
    """Return a conversation in ChatML."""
    parts = [f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns]
    return "".join(parts)


def chat(*turns: Turn, learned: tuple[int, ...] | None = None) -> tuple[Learned]:
    """Return the example of a conversation in ChatML.

    Args:
        turns: up to the last one that is learned.
        learned: indices of the supervised turns; the assistant's by default.
    """
    if learned is None:
        learned = tuple(index for index, (role, _) in enumerate(turns) if role == "assistant")
    answers = [turns[index][1] for index in learned]
    spans = tuple(f"{answer}<|im_end|>" for answer in answers)
    return (Learned(chatml(*turns), spans, answers[-1]),)


def learned_pairs(pairs: Iterable[tuple[str, str]]) -> tuple[LearnedText, ...]:
    """Return the examples of prompts and completions in ChatML."""
    return tuple(
        (chatml(("user", prompt), ("assistant", answer)), f"{answer}<|im_end|>")
        for prompt, answer in pairs
    )


def refused(*words: str) -> Refused:
    """Return the expectation of a refusal with these words."""
    return Refused(words)


def messages(*turns: Turn) -> list[dict[str, str]]:
    """Return turns as messages."""
    return [{"role": role, "content": content} for role, content in turns]


def marked(text: str, reference: str) -> Learned:
    """Return the example of a text whose supervised parts are between « and »."""
    spans = re.findall("«(.*?)»", text, flags=re.DOTALL)
    return Learned(re.sub("[«»]", "", text), tuple(spans), reference)
