"""The columns of each benchmark's rows that are read; a row may have others."""

from pydantic import BaseModel, ConfigDict, Field


class SourceRow(BaseModel):
    """A row of a benchmark as it is published."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class HellaswagRow(SourceRow):
    """The start of a text, and four ways in which it may end."""

    activity_label: str
    """What the text is about."""
    ctx_a: str
    """Its first sentences."""
    ctx_b: str
    """The start of the sentence to complete."""
    endings: tuple[str, ...]
    label: int
    """Index of the right ending."""


class PiqaRow(SourceRow):
    """A goal, and two ways to reach it."""

    goal: str
    sol1: str
    sol2: str
    label: int
    """Index of the right solution."""


class LabeledChoices(SourceRow):
    """The answers to a question, with a letter or number for each."""

    text: tuple[str, ...]
    label: tuple[str, ...]


class ScienceRow(SourceRow):
    """A question of a school exam with several answers."""

    choices: LabeledChoices
    answer_key: str = Field(alias="answerKey")
    """Label of the right answer."""

    @property
    def gold(self) -> int:
        """Index of the right answer."""
        return self.choices.label.index(self.answer_key)


class ArcRow(ScienceRow):
    """A question of ARC."""

    question: str


class OpenbookRow(ScienceRow):
    """A question of OpenBookQA."""

    question_stem: str


class WinograndeRow(SourceRow):
    """A sentence with a gap, marked by an underscore, and two names for it."""

    sentence: str
    option1: str
    option2: str
    answer: int
    """Number of the right name, from 1."""


class LambadaRequest(SourceRow):
    """A passage and its last word."""

    context: str
    continuation: str


class LambadaRow(SourceRow):
    """A document of LAMBADA, as its wheel stores it."""

    request: LambadaRequest
