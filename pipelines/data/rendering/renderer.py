"""Rows to tokens, exactly as at inference, and which of them are supervised.

templates.py                the chat template, and the recipe's overrides of the tokenizer
token_positions.py          text → tokens, and where a character is among them
endings.py                  how the template ends an answer
answers.py                  one answer, in the rendering that ends with it
turns.py                    all answers of a conversation
containment.py              a rendering has everything that the row has
tool_rendering.py           so it has tools, their calls and their results
layouts.py                  where answers are, for all conversations of the same roles
conversation_rendering.py   many conversations
verbatim.py                 texts without a template, and rows that are already rendered
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from transformers import PreTrainedTokenizerBase

from pipelines.config.data_section import DataSection
from pipelines.data.conversation import Conversation, ParsedRow, PlainText
from pipelines.data.notes import Note
from pipelines.data.rendering.answers import AnswerLocator
from pipelines.data.rendering.containment import REASONING
from pipelines.data.rendering.conversation_rendering import ConversationRenderer
from pipelines.data.rendering.example import Example, truncate
from pipelines.data.rendering.templates import ChatTemplate
from pipelines.data.rendering.token_positions import Encoded, SpecialTokens, TextEncoder
from pipelines.data.rendering.turns import Rendering
from pipelines.data.rendering.verbatim import VerbatimRenderer
from pipelines.errors import DataError
from pipelines.runtime.stage import digest

Outcome = list[Rendering] | DataError
ExamplesOrError = tuple[Example, ...] | DataError
"""The examples of a row, or why it cannot be learned."""
TEMPLATE_MARKS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<|turn>",
    "<|assistant|>",
    "<|user|>",
    "<|start|>assistant",
    "<|start_of_role|>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
"""What common chat templates write at the start of a turn."""


class Renderer:
    """Renders and tokenizes rows; each process makes its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: DataSection) -> None:
        """Use a tokenizer that `pipelines.data.rendering.templates.prepared_tokenizer` returned."""
        self._settings = settings
        self._special = SpecialTokens(tokenizer)
        self._encoder = TextEncoder(tokenizer, self._special)
        written = f"{tokenizer.chat_template or ''} {' '.join(tokenizer.get_vocab())}"
        self._other_marks = tuple(mark for mark in TEMPLATE_MARKS if mark not in written)
        self._writes_date = "strftime_now" in (tokenizer.chat_template or "")
        self._conversations: ConversationRenderer | None = None
        if not tokenizer.chat_template:
            self._verbatim = VerbatimRenderer(None, None, self._special)
            return
        template = ChatTemplate(tokenizer)
        locator = AnswerLocator(
            template,
            self._encoder,
            self._special,
            supervise_empty_thinking=settings.supervise_empty_thinking,
        )
        self._conversations = ConversationRenderer(template, locator)
        self._verbatim = VerbatimRenderer(template, locator.ending, self._special)

    def render(self, rows: Sequence[ParsedRow]) -> list[ExamplesOrError]:
        """Return the examples of each row, or why it cannot be learned.

        The text of an error continues a sentence that starts with the row's place.

        Args:
            rows: at most as many as fit into memory with their tokens.

        Returns:
            one outcome for each row, in order.
        """
        outcomes = self._render_texts(rows)
        texts = list[str]()
        for outcome in outcomes:
            if not isinstance(outcome, DataError):
                texts += [rendering.text for rendering in outcome]
        encoded = iter(self._encoder.encode(texts))
        results = list[ExamplesOrError]()
        for row, outcome in zip(rows, outcomes, strict=True):
            if isinstance(outcome, DataError):
                results.append(outcome)
                continue
            tokens = list(islice(encoded, len(outcome)))
            results.append(self._examples(row, outcome, tokens))
        return results

    def _render_texts(self, rows: Sequence[ParsedRow]) -> list[Outcome]:
        """Return the renderings of each row; conversations are rendered together."""
        outcomes = [self._without_template(row) for row in rows]
        waiting = list[Conversation]()
        for index, row in enumerate(rows):
            if outcomes[index] is None and isinstance(row, Conversation):
                try:
                    waiting.append(self._verbatim.unrendered(row))
                except DataError as error:
                    outcomes[index] = error
        rendered: Iterator[Outcome] = iter(())
        if self._conversations is not None:
            rendered = iter(self._conversations.render(waiting))
        return [next(rendered) if outcome is None else outcome for outcome in outcomes]

    def _without_template(self, row: ParsedRow) -> Outcome | None:
        """Return the rendering of a row that the template is not applied to; None for others."""
        try:
            if isinstance(row, PlainText):
                return [self._verbatim.text(row.text)]
            rendering = self._verbatim_pair(row)
        except DataError as error:
            return error
        if rendering is not None:
            return [rendering]
        if self._conversations is None:
            return DataError(
                "is a conversation, but the base's tokenizer has no chat template; set "
                "data.chat_template: chatml, or a Jinja file, or use prompt and completion"
            )
        return None

    def _verbatim_pair(self, row: Conversation) -> Rendering | None:
        """Return the rendering of a pair that the template is not applied to."""
        roles = [message.role for message in row.messages]
        if not row.is_pair or roles != ["user", "assistant"]:
            return None
        prompt, completion = row.messages
        if self._conversations is None:
            rendering = self._verbatim.pair(prompt.content, completion.content)
        else:
            found = self._verbatim.rendered_pair(prompt.content, completion.content)
            if found is None:
                return None
            rendering = found
        if prompt.supervised:
            return replace(rendering, spans=((0, len(rendering.text)),))
        return rendering

    def _examples(
        self, row: ParsedRow, renderings: Sequence[Rendering], encoded: Sequence[Encoded]
    ) -> ExamplesOrError:
        group = _group_of(row)
        row_notes = self._notes_on(row)
        examples = []
        try:
            for rendering, tokens in zip(renderings, encoded, strict=True):
                notes = rendering.notes
                if "already rendered" not in notes:
                    notes = (*notes, *row_notes)
                examples.append(self._example(rendering, tokens, group, notes))
        except DataError as error:
            return error
        return tuple(examples)

    def _example(
        self, rendering: Rendering, encoded: Encoded, group: str, notes: tuple[Note, ...]
    ) -> Example:
        ids = list(encoded.ids)
        supervised = self._mask(rendering, encoded)
        prompt = self._encoder.start_of(rendering.prompt, rendering.text, encoded)
        end_token = None
        if rendering.end is not None:
            end_token = self._encoder.token_id(rendering.end)
        if rendering.is_end_appended and end_token is not None:
            ids.append(end_token)
            supervised.append(True)
        prefix = self._encoder.prefix
        if rendering.has_prefix and prefix:
            ids = prefix + ids
            supervised = [False] * len(prefix) + supervised
            prompt += len(prefix) if prompt else 0
        supervised[0] = False  # no earlier token can predict the first one
        limit = self._settings.max_tokens
        example = Example(
            input_ids=ids,
            supervised=supervised,
            prompt_tokens=prompt,
            reference=rendering.reference,
            group=group,
            was_cut=len(ids) > limit,
            end_token=end_token,
            notes=notes,
        )
        if example.was_cut and self._settings.long_examples == "truncate":
            return truncate(example, limit)
        return example

    def _mask(self, rendering: Rendering, encoded: Encoded) -> list[bool]:
        """Return whether each token is supervised."""
        mask = [False] * len(encoded.ids)
        for start, end in rendering.spans:
            first = self._encoder.start_of(start, rendering.text, encoded)
            last = self._encoder.end_of(end, rendering.text, encoded)
            for index in range(first, last):
                mask[index] = True
        return mask

    def _notes_on(self, row: ParsedRow) -> tuple[Note, ...]:
        """Return the observations about the row's own texts, and about the template."""
        notes = list[Note]()
        texts = _texts_of(row)
        if any(self._special.pattern.search(text) for text in texts):
            notes.append("special tokens in text")
        if any(self._has_other_marks(text) for text in texts):
            notes.append("marks of another template")
        if self._writes_date and isinstance(row, Conversation):
            notes.append("date in template")
        return tuple(notes)

    def _has_other_marks(self, text: str) -> bool:
        """Return whether a text has marks of templates that are not special tokens here."""
        return any(mark in text for mark in self._other_marks)


def _texts_of(row: ParsedRow) -> list[str]:
    """Return the texts that the row has itself."""
    if isinstance(row, PlainText):
        return [row.text]
    texts = [message.content for message in row.messages]
    for message in row.messages:
        texts += [str(message.fields[name]) for name in REASONING if name in message.fields]
    return texts


def _group_of(row: ParsedRow) -> str:
    """Return a digest of the start of a conversation, or of a text; it identifies a group."""
    if isinstance(row, PlainText):
        return digest(row.text)
    start = list[list[str]]()
    for message in row.messages:
        start.append([message.role, message.content])
        if message.role == "user":
            break
    return digest(start)
