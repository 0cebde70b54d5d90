"""Texts without a chat template: plain texts, pairs, and rows that are already rendered.

A text gets the tokens that the tokenizer puts before a text, such as BOS, and one token that ends
it.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property

from pipelines.data.conversation import Conversation, Message
from pipelines.data.rendering.endings import QUESTION, Ending
from pipelines.data.rendering.templates import ChatTemplate
from pipelines.data.rendering.token_positions import SpecialTokens
from pipelines.data.rendering.turns import Rendering
from pipelines.errors import DataError

_MARK = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""A mark of a template that need not be a special token, such as `<|assistant|>` or `[/INST]`."""


@dataclass(frozen=True)
class QuestionMarks:
    """What a chat template writes around a question."""

    before: str
    after: str
    """Through the start of the answer."""
    opening: str
    """What it writes only to open the answer."""


class VerbatimRenderer:
    """Renders texts as they are."""

    def __init__(
        self, template: ChatTemplate | None, ending: Ending | None, special: SpecialTokens
    ) -> None:
        """Use the chat template, if there is one, only to recognize rows that it has rendered."""
        self._template = template
        self._ending = ending
        self._special = special

    def text(self, text: str) -> Rendering:
        """Return a text, all of which is supervised.

        Raises:
            DataError: it needs an end token, and the tokenizer has none.
        """
        if self._is_rendered_text(text):
            return self._rendered(text, 0, text)
        return self._closed(text, 0, text, self._eos(text))

    def pair(self, prompt: str, completion: str) -> Rendering:
        """Return a prompt directly followed by its completion, which is supervised.

        Args:
            prompt: not supervised.
            completion: follows the prompt without any separator.

        Raises:
            DataError: it needs an end token, and the tokenizer has none.
        """
        end = self._eos(completion)
        return self._closed(prompt + completion, len(prompt), completion, end)

    def rendered_pair(self, prompt: str, completion: str) -> Rendering | None:
        """Return a pair whose prompt the template has already rendered; None if it has not.

        Args:
            prompt: ends with what opens an answer if the template has rendered it.
            completion: the answer, with or without the token that ends it.
        """
        if self._marks is None:
            return None
        for ending in (self._marks.after, self._marks.opening):
            if _MARK.search(ending) and prompt.endswith(ending):
                return self._rendered(prompt + completion, len(prompt), completion)
        return None

    def unrendered(self, row: Conversation) -> Conversation:
        """Return a conversation whose answers do not end with a token that ends an answer.

        Raises:
            DataError: a message is a conversation that the template has already rendered.
        """
        for message in row.messages:
            self._check_is_not_rendered(message.content)
        ends = tuple(self._ends_of_answer())
        if not any(_ends_with(message, ends) for message in row.messages):
            return row
        messages = tuple(_without_end(message, ends) for message in row.messages)
        return replace(row, messages=messages)

    def _check_is_not_rendered(self, content: str) -> None:
        if self._marks is None:
            return
        opening = self._marks.opening.strip()
        first = self._special.pattern.search(self._marks.before)
        if first is None or _MARK.search(opening) is None:
            return
        starts_turn = content.lstrip().startswith(first[0])
        if starts_turn and opening in content:
            raise DataError(
                f"has a message that starts with {first[0]!r} and contains {opening!r}, as if the "
                "chat template had already rendered it, so that it would be applied twice; end the "
                f"prompt of a pair with {self._marks.opening!r}, write the messages without the "
                "template, or set data.chat_template: none"
            )

    def _is_rendered_text(self, text: str) -> bool:
        """Return whether a text contains what the template writes to open a turn."""
        if self._marks is None:
            return False
        ends = {self._special.bos, self._special.eos}
        written = self._special.pattern.findall(self._marks.before + self._marks.opening)
        marks = set(written) - ends
        if _MARK.search(self._marks.opening):
            marks.add(self._marks.opening.strip())
        return any(mark in text for mark in marks)

    def _rendered(self, text: str, prompt: int, answer: str) -> Rendering:
        stripped = text.rstrip()
        ends = self._ends_of_answer()
        present = [end for end in ends if stripped.endswith(end)]
        if present:
            rendering = self._already_closed(text, prompt, answer, present[0])
        else:
            end = ends[0] if ends else self._eos(answer)
            rendering = self._closed(text, prompt, answer, end)
        rendering = replace(rendering, notes=("already rendered",))
        if self._marks is not None and not self._starts_with_bos(self._marks.before):
            return replace(rendering, has_prefix=False)  # the template writes no BOS
        return rendering

    def _closed(self, text: str, prompt: int, answer: str, end: str) -> Rendering:
        """Return a text with one end token, which is appended unless the text ends with it."""
        if text.endswith(end):
            return self._already_closed(text, prompt, answer, end)
        span = (prompt, len(text))
        return Rendering(
            text,
            spans=(span,),
            prompt=prompt,
            reference=answer,
            end=end,
            is_end_appended=True,
            has_prefix=not self._starts_with_bos(text),
        )

    def _already_closed(self, text: str, prompt: int, answer: str, end: str) -> Rendering:
        """Return a text that ends with its end token, maybe followed by whitespace."""
        span_end = len(text)
        reference = answer
        if prompt > 0:
            span_end = len(text.rstrip())
            reference = answer.rstrip().removesuffix(end)
        span = (prompt, span_end)
        return Rendering(
            text,
            spans=(span,),
            prompt=prompt,
            reference=reference,
            end=end,
            has_prefix=not self._starts_with_bos(text),
        )

    def _starts_with_bos(self, text: str) -> bool:
        return self._special.bos is not None and text.startswith(self._special.bos)

    def _ends_of_answer(self) -> list[str]:
        """Return the tokens that can end an answer, first the one that the template writes."""
        ends = list[str]()
        if self._ending and self._ending.closing:
            ends.append(self._special.last_in(self._ending.closing))
        if self._special.eos is not None:
            ends.append(self._special.eos)
        return ends

    def _eos(self, text: str) -> str:
        if self._special.eos is None:
            raise DataError(
                f"has the text {text[:40]!r}, after which the model must learn to end, but the "
                "base's tokenizer has no eos_token; set data.eos_token"
            )
        return self._special.eos

    @cached_property
    def _marks(self) -> QuestionMarks | None:
        """What the template writes around a question; None if it does not take one alone."""
        if self._template is None:
            return None
        try:
            prompt = self._template.render([QUESTION], opens_answer=True)
            alone = self._template.render([QUESTION])
        except DataError:
            return None
        before, found, after = prompt.partition(QUESTION.content)
        if not found:
            return None
        opening = ""
        if prompt.startswith(alone):
            opening = prompt[len(alone) :]
        return QuestionMarks(before, after, opening)


def _ends_with(message: Message, ends: tuple[str, ...]) -> bool:
    return message.role == "assistant" and message.content.rstrip().endswith(ends)


def _without_end(message: Message, ends: tuple[str, ...]) -> Message:
    if not _ends_with(message, ends):
        return message
    content = message.content.rstrip()
    end = next(one for one in ends if content.endswith(one))
    return replace(message, content=content.removesuffix(end))
