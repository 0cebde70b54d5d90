"""The result of one model on one item: a type of record for each kind of item.

    kind          record              item
    task          TaskRecord          a held-out example: its loss
    generation    GenerationRecord    a prompt with a generated answer, and its metrics
    general       ChoiceRecord        a multiple-choice question
    answer        SingleAnswerRecord  a question with a single answer
    score         ScoreRecord         a question that a task of lm-eval scores with its own metric
    text          PassageRecord       a passage of plain text
    chat          ChatRecord          a question formatted as a chat
    any but task  LeftOutRecord       an item that was not scored

Two models are compared on the same items only: records are of the same item if their kind, id and
`prompt_sha256` are equal. Losses are in nats. See `record_files` for the files.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """The loss of a held-out example."""

    kind: Literal["task"] = "task"
    id: int
    """Its index among the held-out examples."""
    prompt_sha256: str
    """Digest of its token ids and of which of them are supervised."""
    nll: float
    """Negative log-likelihood, summed over its supervised tokens."""
    tokens: int
    """Its supervised tokens."""

    @property
    def units(self) -> int:
        """What its loss is divided by: tokens."""
        return self.tokens


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord:
    """What identifies an item of a benchmark; every record but that of a held-out example has it.

    Answers, passages and chats have the benchmark under which they are counted.
    """

    kind: str
    id: int | str
    """Unique among the items of its kind."""
    benchmark: str
    prompt_sha256: str
    """Digest of the question with its answers, or of the prompt with its reference."""


@dataclass(frozen=True, kw_only=True)
class GenerationRecord(BenchmarkRecord):
    """An answer to the prompt of a held-out example."""

    kind: Literal["generation"] = "generation"
    id: int
    """Index of the held-out example."""
    prompt: str
    reference: str
    """The answer in the data."""
    answer: str
    """What the model generated."""
    metrics: dict[str, float]
    """Metric → its value; higher is better."""
    errors: dict[str, str]
    """Metric → why it could not be computed."""
    ended: bool
    """Whether the answer ended before the maximum length."""


@dataclass(frozen=True, kw_only=True)
class ChoiceRecord(BenchmarkRecord):
    """The likelihood of each choice of a question."""

    kind: Literal["general"] = "general"
    id: str
    gold: int
    """Index of the right choice."""
    log_likelihoods: tuple[float, ...]
    """Of each choice, in nats."""
    bytes: tuple[int, ...]
    """Length of the scored text of each choice."""
    greedy: tuple[bool, ...]
    """Whether each choice is the likeliest of all texts."""


@dataclass(frozen=True, kw_only=True)
class SingleAnswerRecord(BenchmarkRecord):
    """The likelihood of the right answer to a question without choices."""

    kind: Literal["answer"] = "answer"
    id: str
    nll: float
    """Negative log-likelihood of the answer."""
    tokens: int
    bytes: int
    """Length of the answer."""
    greedy: bool
    """Whether the answer is the likeliest of all texts."""


@dataclass(frozen=True, kw_only=True)
class ScoreRecord(BenchmarkRecord):
    """The score of a document by the metric of its task."""

    kind: Literal["score"] = "score"
    id: str
    metric: str
    value: float
    """Of the metric; a finite number."""
    higher_is_better: bool
    log_likelihoods: tuple[float, ...] | None = None
    """Of each answer, in nats; None if the answer was generated."""
    greedy: tuple[bool, ...] | None = None
    """Whether each answer is the likeliest; None if the text is one unit or was generated."""
    ended: bool | None = None
    """Whether a generated answer ended before the maximum length; None for other answers."""


@dataclass(frozen=True, kw_only=True)
class PassageRecord(BenchmarkRecord):
    """The loss of a passage of plain text."""

    kind: Literal["text"] = "text"
    id: str
    nll: float
    """Negative log-likelihood, summed over the tokens after the first."""
    tokens: int
    bytes: int
    """Length of the scored text."""

    @property
    def units(self) -> int:
        """What its loss is divided by: bytes."""
        return self.bytes


@dataclass(frozen=True, kw_only=True)
class ChatRecord(BenchmarkRecord):
    """The loss of the right answer to a question that is formatted as a chat."""

    kind: Literal["chat"] = "chat"
    id: str
    nll: float
    """Negative log-likelihood, summed over the tokens of the answer."""
    tokens: int
    rows: tuple[int, int]
    """First row and end of its tokens in the table of log-probabilities."""

    @property
    def units(self) -> int:
        """What its loss is divided by: tokens."""
        return self.tokens


@dataclass(frozen=True, kw_only=True)
class LeftOutRecord(BenchmarkRecord):
    """An item that was not scored; it is left out for all models, and counted."""

    kind: Literal["generation", "general", "answer", "score", "text", "chat"]
    prompt: str | None = None
    """The prompt that is not answered; None for other kinds."""
    reference: str | None = None
    """Of that prompt."""
    left_out: str
    """Why the item was not scored."""


AbilityRecord = ChoiceRecord | SingleAnswerRecord | ScoreRecord
"""The record of an item that measures general abilities."""
LossRecord = TaskRecord | PassageRecord | ChatRecord
"""The record of a loss; `units` is what it is divided by."""
ItemRecord = (
    TaskRecord
    | GenerationRecord
    | ChoiceRecord
    | SingleAnswerRecord
    | ScoreRecord
    | PassageRecord
    | ChatRecord
    | LeftOutRecord
)
"""The record of any item."""
