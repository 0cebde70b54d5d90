"""What every model is evaluated on, as text: a context, the scored answers, and the right one."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["general", "answer", "chat", "text", "score"]
"""A question with one right answer among wrong ones; one with a single answer; one as a chat; a
passage of plain text; a document of a task that computes its own value."""


@dataclass(frozen=True)
class Choice:
    """One answer."""

    lead: str
    """Text after the context that is not scored (WinoGrande puts each name there)."""
    scored: str
    """Text whose likelihood counts."""


@dataclass(frozen=True)
class Item:
    """One question."""

    benchmark: str
    id: str
    context: str
    choices: tuple[Choice, ...]
    gold: int
    """Index of the right answer among the choices."""
    kind: Kind = "general"


def choice_item(benchmark: str, name: str, context: str, answers: list[str], gold: int) -> Item:
    """Return a question whose answers follow its context after one blank."""
    choices = tuple(Choice("", f" {answer.strip()}") for answer in answers)
    return Item(benchmark, name, context, choices, gold)
