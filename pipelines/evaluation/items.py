"""What every model is evaluated on, as text: a context, the scored answers, and the right one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.runtime.stage import digest

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

    @property
    def prompt_sha256(self) -> str:
        """Digest of its context and answers."""
        answers = [choice.lead + choice.scored for choice in self.choices]
        return digest([self.context, *answers])


def choice_item(benchmark: str, name: str, context: str, answers: Sequence[str], gold: int) -> Item:
    """Return a question whose answers follow its context after one blank.

    Args:
        benchmark: name under which the item is reported.
        name: of the item; unique within a comparison.
        context: the text before each answer.
        answers: of which one is right.
        gold: index of the right one.
    """
    choices = tuple(Choice("", f" {answer.strip()}") for answer in answers)
    return Item(benchmark, name, context, choices, gold)
