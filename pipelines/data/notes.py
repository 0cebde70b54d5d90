"""Observations about examples that are not errors; the result counts the examples of each."""

from typing import Literal

Note = Literal[
    "special tokens in text",
    "marks of another template",
    "already rendered",
    "date in template",
    "empty thinking",
    "other generation prompt",
    "one example per answer",
]
MEANING: dict[str, str] = {
    "special tokens in text": (
        "the row's text contains special tokens of the base, which the model reads as marks"
    ),
    "marks of another template": (
        "the row's text contains marks of another model's chat template, which this base reads as "
        "plain text; write the rows as messages, without a template"
    ),
    "date in template": (
        "the chat template writes the date of the preparation into the prompt, and another date "
        "at inference; name a template without it in data.chat_template"
    ),
    "already rendered": (
        "the row already contains the rendered chat template, so it is not applied again"
    ),
    "empty thinking": (
        "the chat template writes an empty thinking block before the answer; it is part of the "
        "prompt unless data.supervise_empty_thinking is set"
    ),
    "other generation prompt": (
        "the chat template's generation prompt differs from how it renders the start of an answer; "
        "the answer is learned as rendered"
    ),
    "one example per answer": (
        "the chat template rewrites earlier turns, so each answer is an example of its own with "
        "the history as it is at inference"
    ),
}
