"""Find the answers in a rendered conversation.

An answer starts where the rendering of its prompt ends, and ends with the token that ends the
model's turn. If the template renders earlier answers as it renders the last one, all answers are
supervised in one rendering. If it rewrites them, such as a template that drops the reasoning of
earlier turns, each answer is supervised in the rendering that ends with it, because the model
answers after that history.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.data.conversation import Message
from pipelines.data.notes import Note
from pipelines.data.rendering.answers import AnswerLocator, LocatedAnswer, Render, Span
from pipelines.data.rendering.containment import check_answer, check_context
from pipelines.data.rendering.token_positions import common_length

REPLACEMENTS = ("qzkvjx", "~10~")
"""Contents of which at least one differs from any other content in its first and last character."""


@dataclass(frozen=True)
class Rendering:
    """A text with its supervised parts."""

    text: str
    """What is tokenized."""
    spans: tuple[Span, ...]
    """Supervised parts of `text`, in order."""
    prompt: int
    """Where the last supervised answer starts; 0 if nothing precedes it."""
    reference: str
    end: str | None = None
    """The token that ends the last supervised answer."""
    is_end_appended: bool = False
    """The end token follows `text`, which does not contain it."""
    notes: tuple[Note, ...] = ()
    has_prefix: bool = False
    """The tokens that the tokenizer puts before a text precede it."""
    source: str = ""
    """What the chat template wrote."""
    messages: int = 0
    """Number of messages in `source`."""


def find_turns(
    messages: Sequence[Message], render: Render, locator: AnswerLocator
) -> list[Rendering]:
    """Return one rendering with all supervised turns, or one for each supervised answer.

    Args:
        messages: of a conversation, of which at least one is supervised.
        render: renders some of the messages.
        locator: finds one answer.

    Raises:
        DataError: the template does not render what the messages have, or an answer cannot be
            located.
    """
    supervised = [index for index, message in enumerate(messages) if message.supervised]
    used = messages[: supervised[-1] + 1]
    roles = {used[index].role for index in supervised}
    if roles != {"assistant"}:
        return [_find_everything(used, render, locator)]
    answers = [locator.locate(used, index, render) for index in supervised]
    last = answers[-1]
    check_context(used, last.source)
    spans = list[Span]()
    for answer in answers[:-1]:
        span = locator.inner_span(answer, last.text)
        if span is None:
            return [_alone(one, used, locator) for one in answers]
        spans.append(span)
    spans.append(locator.last_span(last))
    return [_rendering(answers, spans, used)]


def _alone(answer: LocatedAnswer, messages: Sequence[Message], locator: AnswerLocator) -> Rendering:
    """Return the rendering that ends with an answer, which alone is supervised."""
    span = locator.last_span(answer)
    rendering = _rendering([answer], [span], messages)
    return replace(rendering, notes=(*rendering.notes, "one example per answer"))


def _rendering(
    answers: Sequence[LocatedAnswer], spans: Sequence[Span], messages: Sequence[Message]
) -> Rendering:
    last = answers[-1]
    return Rendering(
        text=last.text,
        spans=tuple(spans),
        prompt=last.start,
        reference=_reference(last, messages),
        end=last.end,
        is_end_appended=not last.is_closed,
        notes=_notes_of(answers),
        source=last.source,
        messages=last.index + 1,
    )


def _reference(answer: LocatedAnswer, messages: Sequence[Message]) -> str:
    """Return the answer exactly as in the row; as rendered if it only calls tools."""
    return messages[answer.index].content or answer.source[answer.start : answer.body]


def _notes_of(answers: Sequence[LocatedAnswer]) -> tuple[Note, ...]:
    notes = dict[Note, None]()
    for answer in answers:
        notes.update(dict.fromkeys(answer.notes))
    return tuple(notes)


def _find_everything(
    messages: Sequence[Message], render: Render, locator: AnswerLocator
) -> Rendering:
    """Return a rendering in which messages of other roles than the assistant are supervised too."""
    source = render(messages, False)
    check_context(messages, source)
    for message in messages:
        if message.supervised and message.role == "assistant":
            check_answer(message, source)
    answers = [
        locator.locate(messages, index, render)
        for index, message in enumerate(messages)
        # No message precedes the first one, so the model cannot be prompted for it.
        if message.role == "assistant" and index > 0
    ]
    last = answers[-1] if answers else None
    ends_with_answer = last is not None and last.index == len(messages) - 1
    text = last.text if last is not None and ends_with_answer else source
    everything = Rendering(
        text=text,
        spans=_without_unsupervised(messages, text, render, locator),
        prompt=0,
        reference="",
        notes=_notes_of(answers),
        source=source,
        messages=len(messages),
    )
    if last is None or not text.startswith(last.source[: last.body]):
        return everything
    return replace(
        everything,
        prompt=last.start,
        reference=_reference(last, messages),
        end=last.end,
        is_end_appended=ends_with_answer and not last.is_closed,
    )


def _without_unsupervised(
    messages: Sequence[Message], text: str, render: Render, locator: AnswerLocator
) -> tuple[Span, ...]:
    """Return the parts of a rendering without the messages that are not supervised."""
    spans = list[Span]()
    start = 0
    for index, message in enumerate(messages):
        if message.supervised:
            continue
        changed_start, changed_end = _changed_part(messages, index, render)
        spans.append((start, changed_start))
        start = changed_end + locator.closing_length(text, changed_end)
    spans.append((start, len(text)))
    return tuple((first, end) for first, end in spans if first < end)


def _changed_part(messages: Sequence[Message], index: int, render: Render) -> Span:
    """Return which part of the rendering changes with a message."""
    source = render(messages, False)
    firsts = list[int]()
    ends = list[int]()
    for content in REPLACEMENTS:
        changed = [*messages]
        changed[index] = replace(messages[index], content=content, fields={})
        other = render(changed, False)
        first = common_length(source, other)
        same_at_end = common_length(source[::-1], other[::-1])
        # What both texts start with is not counted at their ends again.
        after_first = min(len(source), len(other)) - first
        firsts.append(first)
        ends.append(len(source) - min(same_at_end, after_first))
    return min(firsts), max(ends)
