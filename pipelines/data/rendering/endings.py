"""How a chat template ends an answer."""

from dataclasses import dataclass

from pipelines.data.conversation import Message
from pipelines.data.rendering.templates import PROBE_MESSAGE, ChatTemplate
from pipelines.data.rendering.token_positions import SpecialTokens, common_length
from pipelines.errors import DataError

QUESTION = PROBE_MESSAGE
ANSWER = Message("assistant", "wyxqzj answer wyxqzj")
NEXT_QUESTION = Message("user", "jqvzkw again jqvzkw")


@dataclass(frozen=True)
class Ending:
    """What a template writes after an answer without tool calls."""

    tail: str
    """After the last answer."""
    closing: str
    """The start of `tail`, up to and including the token that ends the answer; empty if the
    template writes no such token."""
    inner_closing: str
    """The same for an answer that is followed by another turn."""
    following: str
    """If nothing ends the last answer: what follows an earlier one, through the token that starts
    the next turn; empty if that is not a token."""
    opening: str
    """What the template writes only to open an answer; may be empty."""


def find_ending(template: ChatTemplate, special: SpecialTokens) -> Ending | None:
    """Return how the template ends an answer; None if it does not take a question and an answer.

    Args:
        template: rendered with a question, an answer and a second question.
        special: the tokenizer's tokens, by which the end of a turn is recognized.
    """
    try:
        question = template.render([QUESTION])
        prompt = template.render([QUESTION], opens_answer=True)
        last = template.render([QUESTION, ANSWER])
        inner = template.render([QUESTION, ANSWER, NEXT_QUESTION])
    except DataError:
        return None
    opening = prompt[common_length(prompt, question) :]
    _, found, tail = last.rpartition(ANSWER.content)
    _, also_found, rest = inner.rpartition(ANSWER.content)
    inner_tail, has_next, _ = rest.partition(NEXT_QUESTION.content)
    if not (found and also_found and has_next):
        return None
    common = tail[: common_length(tail, inner_tail)]
    run = special.first_run(common)
    if run:
        _, run_end = run
        closing = common[:run_end]
        return Ending(tail, closing, inner_closing=closing, following="", opening=opening)
    closing = _through_first_token(tail, special)
    inner_closing = _through_first_token(inner_tail, special)
    following = ""
    if not closing and inner_tail.startswith(tail):
        following = _through_next_token(inner_tail, len(tail), special)
    before_question, _, _ = question.partition(QUESTION.content)
    if _opens_turn(inner_closing, before_question, special):
        inner_closing = ""
    return Ending(tail, closing, inner_closing, following, opening)


def _through_next_token(text: str, start: int, special: SpecialTokens) -> str:
    token = special.next_token(text, start)
    if token is None:
        return ""
    _, end = token
    return text[:end]


def _through_first_token(tail: str, special: SpecialTokens) -> str:
    run = special.first_run(tail)
    if run is None:
        return ""
    run_start, run_end = run
    first_token = special.first_in(tail[run_start:run_end])
    return tail[: run_start + len(first_token)]


def _opens_turn(closing: str, before_question: str, special: SpecialTokens) -> bool:
    """Return whether a token that follows an answer is the one that starts a user's turn."""
    tokens = special.pattern.findall(closing)
    opening = special.pattern.findall(before_question)
    return bool(tokens) and tokens[-1] in opening[-1:]
