"""Observations about examples that are not errors; the result counts the examples of each."""

from typing import Literal

Note = Literal[
    "special tokens in text",
    "already rendered",
    "empty thinking",
    "other generation prompt",
    "one example per answer",
]
MEANING: dict[str, str] = {
    "special tokens in text": (
        "the row's text contains special tokens of the base, which the model reads as marks"
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
