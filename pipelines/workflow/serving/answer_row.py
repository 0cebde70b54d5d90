"""One answer while it is generated: its tokens become text, piece by piece, until it ends.

A piece is passed on once no later token can change it: half of a character, and what may be the
beginning of a stop sequence, wait for the next token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from pipelines.evaluation.generation import stop_position
from pipelines.workflow.serving.sampling import SamplingOptions

FinishReason = Literal["stop", "length"]
INCOMPLETE = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


@dataclass(frozen=True)
class TextPiece:
    """The next characters of an answer."""

    text: str


@dataclass(frozen=True)
class AnswerEnd:
    """The answer is complete."""

    reason: FinishReason
    completion_tokens: int
    """Generated tokens, with the one that ended the answer."""


@dataclass(frozen=True)
class AnswerFailure:
    """The answer cannot be completed."""

    message: str
    status: int
    """Of HTTP: 503 if the request can be sent again, else 500."""


AnswerEvent = TextPiece | AnswerEnd | AnswerFailure


class AnswerRow:
    """A prompt, and the answer so far.

    Attributes:
        prompt: its tokens.
        options: how the answer is generated.
        is_done: no further token is wanted.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        options: SamplingOptions,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Sequence[int],
        emit: Callable[[AnswerEvent], None],
    ) -> None:
        """Start an answer.

        Args:
            prompt: its tokens, at least one.
            options: how the answer is generated.
            tokenizer: decodes the answer.
            end_tokens: tokens that end an answer and are not part of its text.
            emit: receives each event, in the thread that generates.
        """
        self.prompt = list(prompt)
        self.options = options
        self.is_done = False
        self._tokenizer = tokenizer
        self._end_tokens = frozenset(end_tokens)
        self._emit = emit
        self._tokens: list[int] = []
        self._sent = 0
        """Characters that were passed on."""

    def add(self, token: int) -> None:
        """Add a generated token; after the end of the answer it is ignored."""
        if self.is_done:
            return
        is_end = token in self._end_tokens
        if not is_end:
            self._tokens.append(token)
        text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        position = stop_position(text, self.options.stop)
        if position is not None:
            self._finish(text[:position], "stop", len(self._tokens))
        elif is_end:
            self._finish(text, "stop", len(self._tokens) + 1)
        elif len(self._tokens) >= self.options.max_tokens:
            self._finish(text, "length", len(self._tokens))
        else:
            self._send(text[: _stable_length(text, self.options.stop)])

    def fail(self, message: str, *, status: int = 500) -> None:
        """End the answer with an error, unless it has ended."""
        if not self.is_done:
            self.is_done = True
            self._emit(AnswerFailure(message, status))

    def cancel(self) -> None:
        """End the answer without an event; nobody waits for it."""
        self.is_done = True

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self._emit(TextPiece(text[self._sent :]))
            self._sent = len(text)

    def _finish(self, text: str, reason: FinishReason, tokens: int) -> None:
        self.is_done = True
        self._send(text)
        self._emit(AnswerEnd(reason, tokens))


class RowsEnd(StoppingCriteria):
    """Passes the newest token of each row on to its answer; ends the rows whose answers ended."""

    def __init__(self, rows: Sequence[AnswerRow], is_stopping: Callable[[], bool]) -> None:
        """Watch a batch.

        Args:
            rows: of the batch, in order.
            is_stopping: returns whether every row must end now.
        """
        self._rows = rows
        self._is_stopping = is_stopping

    def __call__(
        self, input_ids: torch.LongTensor, scores: object, **kwargs: object
    ) -> torch.BoolTensor:
        """Return (B,), whether each row has ended."""
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.add(token)
        are_all_ending = self._is_stopping()
        ended = [are_all_ending or row.is_done for row in self._rows]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]


def _stable_length(text: str, stop: Sequence[str]) -> int:
    """Return how many characters no later token changes."""
    complete = len(text.rstrip(INCOMPLETE + " "))
    for end in stop:
        for length in range(min(len(end) - 1, len(text)), 0, -1):
            if text.endswith(end[:length]):
                complete = min(complete, len(text) - length)
                break
    return complete
