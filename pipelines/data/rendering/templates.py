"""The chat template of a tokenizer, with the recipe's overrides applied and checked."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from jinja2 import Environment, TemplateError, meta
from jinja2.ext import loopcontrols
from transformers import PreTrainedTokenizerBase

from pipelines.config.data_section import CHATML, NO_TEMPLATE, DataSection
from pipelines.config.recipe import local_path
from pipelines.data.conversation import Message
from pipelines.errors import DataError, one_line

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Marks answers in a template; only transformers' own Jinja environment knows it."""
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What a template raises for messages that it cannot render."""
PROBE_MESSAGE = Message("user", "qzkvjx question qzkvjx")
Tools = Sequence[Mapping[str, Any]]


def prepared_tokenizer(
    tokenizer: PreTrainedTokenizerBase, settings: DataSection
) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the recipe's chat template, its arguments and end token.

    The arguments are written into the template, so that evaluation and serving use them too. It is
    the same tokenizer if the recipe has none of these settings.

    Args:
        tokenizer: of the base; it is not changed.
        settings: may set a chat template, its arguments, and the token that ends an answer.

    Raises:
        DataError: a setting does not fit the tokenizer, or has no effect.
    """
    changes = (settings.chat_template, settings.eos_token, settings.template_arguments)
    prepared = deepcopy(tokenizer) if any(changes) else tokenizer
    if settings.chat_template is not None:
        prepared.chat_template = _read_template(settings.chat_template, tokenizer)
    if settings.eos_token is not None:
        _check_is_one_token(settings.eos_token, tokenizer, "data.eos_token")
        prepared.eos_token = settings.eos_token
    if settings.template_arguments:
        _check_arguments(prepared, settings.template_arguments)
        prepared.chat_template = _with_arguments(
            prepared.chat_template, settings.template_arguments
        )
    return prepared


class ChatTemplate:
    """Renders conversations exactly as at inference."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use the template of `tokenizer`."""
        self._tokenizer = tokenizer
        self._takes_parts = False
        self._takes_parts = not self._renders_text() and self._renders_parts()

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        opens_answer: bool = False,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: at least one.
            tools: JSON schemas of the tools.
            opens_answer: also write what precedes the assistant's next answer.

        Raises:
            DataError: the template does not take these messages.
        """
        try:
            return str(self._apply(self._converted(messages), tools, opens_answer))
        except TEMPLATE_ERRORS as error:
            reason = one_line(error, with_type=not isinstance(error, TemplateError))
            raise DataError(
                f"does not fit the chat template of the base ({reason}); fix or remove it"
            ) from error

    def render_many(self, conversations: Sequence[Sequence[Message]]) -> list[str | None]:
        """Return the text of each conversation, or None if the template does not take it.

        Args:
            conversations: without tools; rendered in one call if the template takes all of them.
        """
        converted = [self._converted(messages) for messages in conversations]
        if not converted:
            return []
        try:
            return list(self._apply(converted, None, False))
        except TEMPLATE_ERRORS:
            return [self._render_or_none(messages) for messages in converted]

    def _converted(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        if self._takes_parts:
            return [_with_parts(message) for message in messages]
        return [message.for_template() for message in messages]

    def _renders_text(self) -> bool:
        """Return whether the template renders contents that are text."""
        rendered = self._render_or_none(self._converted([PROBE_MESSAGE]))
        return rendered is not None and PROBE_MESSAGE.content in rendered

    def _renders_parts(self) -> bool:
        """Return whether it renders contents that are lists of parts, as for images and text."""
        rendered = self._render_or_none([_with_parts(PROBE_MESSAGE)])
        return rendered is not None and PROBE_MESSAGE.content in rendered

    def _render_or_none(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return str(self._apply(messages, None, False))
        except TEMPLATE_ERRORS:
            return None

    def _apply(self, messages: list[Any], tools: Tools | None, opens_answer: bool) -> Any:
        schemas: list[Any] | None = None
        if tools is not None:
            schemas = [dict(tool) for tool in tools]
        return self._tokenizer.apply_chat_template(
            messages,
            tools=schemas,
            tokenize=False,
            add_generation_prompt=opens_answer,
        )


def _with_parts(message: Message) -> dict[str, Any]:
    parts = []
    if message.content:
        parts.append({"type": "text", "text": message.content})
    return {**message.for_template(), "content": parts}


def _read_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that data.chat_template names."""
    if name == NO_TEMPLATE:
        return None
    if name == CHATML:
        for token in CHATML_TOKENS:
            _check_is_one_token(token, tokenizer, "data.chat_template: chatml")
        return CHATML_TEMPLATE
    path = local_path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template {name!r} is not chatml, none or a readable Jinja file "
            f"({one_line(error)}); correct the path"
        ) from error
    _variables(text, f"data.chat_template {name!r}")
    return text


def _with_arguments(template: Any, arguments: Mapping[str, Any]) -> Any:
    """Return a chat template, or each of several by name, that sets its arguments itself."""
    if isinstance(template, dict):
        return {name: _with_arguments(one, arguments) for name, one in template.items()}
    settings = [f"{{% set {name} = {_literal(value)} %}}" for name, value in arguments.items()]
    return "".join([*settings, template])


def _literal(value: Any) -> str:
    """Return a plain value as Jinja writes it: JSON but for null."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, dict):
        items = [f"{json.dumps(name)}: {_literal(one)}" for name, one in value.items()]
        return "{" + ", ".join(items) + "}"
    return json.dumps(value)


def _check_is_one_token(token: str, tokenizer: PreTrainedTokenizerBase, setting: str) -> None:
    """Raise DataError unless the tokenizer encodes the text to exactly one token."""
    ids = tokenizer(token, add_special_tokens=False).input_ids
    if len(ids) == 1 and tokenizer.convert_tokens_to_ids(token) == ids[0]:
        return
    pieces = ", ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
    raise DataError(
        f"{setting} needs the token {token!r}, which the base's vocabulary does not have (it "
        f"becomes {pieces}); choose a token of the vocabulary, or another base"
    )


def _check_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
    """Raise DataError for an argument that the chat template does not use."""
    if not arguments:
        return
    names = ", ".join(sorted(arguments))
    if not tokenizer.chat_template:
        raise DataError(
            f"data.template_arguments sets {names}, which has no effect: the base has no chat "
            "template; remove it or set data.chat_template"
        )
    signature = inspect.signature(tokenizer.apply_chat_template)
    reserved = {*signature.parameters, "messages"} - {"documents"}
    used = _used_variables(tokenizer)
    for name in arguments:
        if name in reserved:
            raise DataError(
                f"data.template_arguments sets {name}, which the pipeline sets; remove it"
            )
        if name not in used:
            known = ", ".join(sorted(used - reserved - set(tokenizer.special_tokens_map)))
            raise DataError(
                f"data.template_arguments sets {name}, which has no effect: the chat template "
                f"does not use it (it uses {known or 'none'}); remove or correct it"
            )


def _used_variables(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the variables that any of the tokenizer's chat templates reads."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        templates = {"default": templates}
    used = set[str]()
    for text in templates.values():
        used |= _variables(text, "the base's chat template")
    return used


def _variables(template: str, what: str) -> set[str]:
    """Return the variables that a template reads without setting them."""
    environment = Environment(extensions=[loopcontrols])
    try:
        tree = environment.parse(GENERATION_TAG.sub("", template))
    except TemplateError as error:
        raise DataError(
            f"{what} is not a valid Jinja template ({one_line(error)}); fix it"
        ) from error
    functions = {"raise_exception", "strftime_now"}
    return meta.find_undeclared_variables(tree) - functions
